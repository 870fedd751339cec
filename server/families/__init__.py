"""The VAE families this server knows. A new one is one class in a file here and one entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, check_limits
from .cogvideox import CogVideoX
from .flux import Flux
from .flux2 import Flux2
from .hunyuan_video import HunyuanVideo
from .kl import KL
from .ltx import LTX, LTX2
from .more_images import DC, HunyuanImage, Tiny
from .more_video import Allegro, Cosmos, HunyuanVideo15, Magvit, Mochi
from .plain import PlainImage, PlainVideo, is_video
from .qwen_image import QwenImage, QwenImage21
from .stable_video import StableVideo
from .wan import Wan

PICTURES: tuple[Family, ...] = (KL(), Flux(), Flux2(), QwenImage(), QwenImage21(), HunyuanImage(), DC(), Tiny())
CLIPS: tuple[Family, ...] = (
    *(Wan(), HunyuanVideo(), HunyuanVideo15(), LTX(), LTX2(), CogVideoX(), Mochi(), Cosmos(), StableVideo()),
    *(Allegro(), Magvit()),
)
PLAIN: tuple[Family, ...] = (PlainImage(), PlainVideo())
FAMILIES: dict[str, Family] = {family.name: family for family in (*PICTURES, *CLIPS, *PLAIN)}


def family_of_class(class_name: str) -> Family | None:
    """The family that a config.json's `_class_name` implies, None when no family claims it."""
    return next((family for family in FAMILIES.values() if class_name in family.class_names), None)


def plain_family(config: Mapping[str, Any]) -> Family:
    """The family of `decoder: plain`, for any class of diffusers."""
    return FAMILIES["plain_video" if is_video(config) else "plain"]


__all__ = ["FAMILIES", "Family", "check_limits", "family_of_class", "plain_family"]
