"""Wan 2.1 and 2.2 (and SkyReels, Cosmos 2, which take its VAE): statistics per channel, patches in Wan 2.2's 5B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class Wan(Video):
    """Unscaled as `WanPipeline.__call__` does: `latents * std + mean`."""

    name = "wan"
    class_names = ("AutoencoderKLWan",)
    channels_key = "z_dim"
    gpu_dtype = "float32"  # as its pipelines' documentation runs it

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        # The halvings say the same, and are all that diffusers 0.33's class and Wan 2.1's config.json have.
        halvings = config["temperal_downsample"]
        spatial = config.get("scale_factor_spatial", 2 ** len(halvings))
        return spatial, config.get("scale_factor_temporal", 2 ** sum(halvings))
