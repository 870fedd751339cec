"""Wan 2.1 and 2.2, and SkyReels and Cosmos 2, which use its VAE. The statistics are per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class Wan(Video):
    """Unscales with `latents * std + mean`, as `WanPipeline.__call__` does."""

    name = "wan"
    class_names = ("AutoencoderKLWan",)
    channels_key = "z_dim"
    # The documentation of its pipelines loads float32 weights, which torch multiplies in TensorFloat-32. bfloat16 is
    # twice as fast, and is what the pipelines of Qwen-Image use for the same layers.
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read the ratios from the config, or calculate them from the downsampling steps."""
        # diffusers 0.33's class and Wan 2.1's config.json have only the downsampling steps, which give the same ratios.
        halvings = config["temperal_downsample"]
        spatial = config.get("scale_factor_spatial", 2 ** len(halvings))
        return spatial, config.get("scale_factor_temporal", 2 ** sum(halvings))
