"""The VAE families that the server knows.

To add a family, write its class in a new file of this package and add it to `IMAGE_FAMILIES`, `VIDEO_FAMILIES`,
`AUDIO_FAMILIES` or `NAMED_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .allegro import Allegro
from .base import Family, check_limits
from .cogvideox import CogVideoX
from .cosmos import Cosmos
from .dc import DC
from .fibo import Fibo
from .flux import Flux
from .flux2 import Flux2
from .flux2_relatives import ErnieImage, Ideogram4
from .glm_image import GlmImage
from .hunyuan_image import HunyuanImage
from .hunyuan_image_refiner import HunyuanImageRefiner
from .hunyuan_video import HunyuanVideo
from .hunyuan_video_15 import HunyuanVideo15
from .kl import KL
from .kvae import KVAE, KVAEVideo
from .ltx import LTX, LTX2, ScaledLTX2
from .ltx2_audio import LTX2Audio
from .ltx2_diffusion import LTX2Diffusion
from .magvit import Magvit
from .minimax_h3 import MiniMaxH3
from .minimax_h3_audio import MiniMaxH3Audio
from .mochi import Mochi
from .oobleck import AceStep, Oobleck
from .plain import PlainImage, PlainVideo, is_video
from .qwen_image import QwenImage, QwenImage21, QwenImageLayered
from .stable_video import StableVideo
from .tiny import Tiny
from .tiny_video import TAECVX, TAEH3, TAEHV, TAELTX
from .wan import Wan

IMAGE_FAMILIES: tuple[Family, ...] = (
    *(KL(), Flux(), Flux2(), QwenImage(), QwenImage21(), HunyuanImage(), DC(), Tiny(), KVAE(), HunyuanImageRefiner()),
)
VIDEO_FAMILIES: tuple[Family, ...] = (
    *(Wan(), HunyuanVideo(), HunyuanVideo15(), LTX(), LTX2(), CogVideoX(), Mochi(), Cosmos(), StableVideo()),
    *(Allegro(), Magvit(), MiniMaxH3(), LTX2Diffusion(), KVAEVideo(), TAEHV(), TAELTX(), TAECVX(), TAEH3()),
)
AUDIO_FAMILIES: tuple[Family, ...] = (Oobleck(), LTX2Audio(), MiniMaxH3Audio())
# The classes of these have another family above, which is used unless an entry of models.yaml names one of these.
NAMED_FAMILIES: tuple[Family, ...] = (
    *(GlmImage(), ErnieImage(), Ideogram4(), QwenImageLayered(), Fibo(), ScaledLTX2(), AceStep()),
)
PLAIN: tuple[Family, ...] = (PlainImage(), PlainVideo())
FAMILIES: dict[str, Family] = {
    family.name: family for family in (*IMAGE_FAMILIES, *VIDEO_FAMILIES, *AUDIO_FAMILIES, *NAMED_FAMILIES, *PLAIN)
}


def family_of_class(class_name: str) -> Family | None:
    """Return the family for the `_class_name` of a config.json, or None if no family lists that class."""
    return next((family for family in FAMILIES.values() if class_name in family.class_names), None)


def plain_family(config: Mapping[str, Any]) -> Family:
    """Return the family for `decoder: plain` in models.yaml, which runs any VAE class of diffusers.

    config: the config.json of the VAE. It tells image from video.
    """
    return FAMILIES["plain_video" if is_video(config) else "plain"]


__all__ = ["FAMILIES", "Family", "check_limits", "family_of_class", "plain_family"]
