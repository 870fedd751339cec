"""AutoencoderKLMagvit, the VAE of EasyAnimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class Magvit(Video):
    """Unscales with only the scaling factor, as `EasyAnimatePipeline.decode_latents` does."""

    name = "magvit"
    class_names = ("AutoencoderKLMagvit",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the encoder's levels; one of them keeps the number of frames."""
        levels = len(config["block_out_channels"])
        return 2 ** (levels - 1), 2 ** (levels - 2)
