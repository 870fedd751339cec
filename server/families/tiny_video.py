"""The TAEHV family: tiny VAEs of video models, for previews.

They take latents as the video models make them, so their configs have no statistics. Nothing is scaled, unless the
client sends a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import Impossible
from ..model_info import LatentSpec
from .base import Family
from .cogvideox import CogVideoX
from .ltx import LTX
from .minimax_h3 import H3Clips
from .video_base import Video

SCALE = 8  # of the networks' three stages together, along each side


class TinyVideo(Family):
    """The common part of the family. Encoding returns latents, without a distribution."""

    has_posterior = False
    gpu_dtype = "float16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the sizes that follow from the patches and from the strides of the decoder."""
        return SCALE * config["patch_size"], prod(config["decoder_time_strides"])

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Say also that the pixels are previews."""
        return replace(super().describe(config), is_preview=True)


class TAEHV(TinyVideo, Video):
    """For HunyuanVideo, HunyuanVideo 1.5, Wan 2.1 and 2.2, Open-Sora 1.3 and Mochi."""

    name = "taehv"
    class_names = ("TAEHV",)


class TAELTX(TinyVideo, LTX):
    """For LTX-2 and later. Takes packed latents too, as they are inside the pipeline's loop."""

    name = "taeltx"
    class_names = ("TAELTX",)
    is_usually_packed = False

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """Return the spec as it is: there are no statistics among the weights."""
        return spec


class TAECVX(TinyVideo, CogVideoX):
    """For CogVideoX."""

    name = "taecvx"
    class_names = ("TAECVX",)


class TAEH3(TinyVideo, H3Clips):
    """For MiniMax-H3, in its clips of 17 frames."""

    name = "taeh3"
    class_names = ("TAEH3",)

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        """Return how many latent frames a video encodes to. Raises Impossible unless it has 17 n + 5 frames."""
        if num_frames == 1:
            raise Impossible("this preview model encodes no single images, only videos of 17 n + 5 frames; send 22")
        return super().latent_frames(spec, num_frames)


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "taehv": {"_class_name": "TAEHV"},
    "taeos1_3": {"_class_name": "TAEHV"},
    "taehv1_5": {"_class_name": "TAEHV", "latent_channels": 32, "patch_size": 2},
    "taehv1_5_super": {"_class_name": "TAEHV", "latent_channels": 32, "patch_size": 2, "is_super": True},
    "taew2_2_super": {"_class_name": "TAEHV", "latent_channels": 48, "patch_size": 2, "is_super": True},
    "taecvx": {"_class_name": "TAECVX"},
    "taeh3": {"_class_name": "TAEH3", "latent_channels": 24, "patch_size": 2},
    "taem1": {
        "_class_name": "TAEHV",
        "latent_channels": 12,
        "encoder_time_strides": [3, 2, 1],
        "decoder_time_strides": [1, 2, 3],
    },
}
"""The configurations of published files that are in no repository of the Hub, by the names of the files.

Those of the other files are in known.yaml.
"""
