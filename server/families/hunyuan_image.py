"""The VAE of HunyuanImage 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kl import KL


class HunyuanImage(KL):
    """Unscales with only the scaling factor, as `HunyuanImagePipeline.__call__` does."""

    name = "hunyuan_image"
    class_names = ("AutoencoderKLHunyuanImage",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read the spatial ratio from the config."""
        return config["spatial_compression_ratio"], 1
