"""The VAE of HunyuanVideo 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class HunyuanVideo15(Video):
    """Unscales with only the scaling factor, as `HunyuanVideo15Pipeline.__call__` does."""

    name = "hunyuan_video_15"
    class_names = ("AutoencoderKLHunyuanVideo15",)
    takes_batches = False
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read both ratios from the config."""
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]
