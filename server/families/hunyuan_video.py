"""HunyuanVideo: latents `[B, C, F, H, W]` decode to `4 (F - 1) + 1` frames of `8 H x 8 W` pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class HunyuanVideo(Video):
    """Unscales with only the scaling factor, as `HunyuanVideoPipeline.__call__` does."""

    name = "hunyuan_video"
    class_names = ("AutoencoderKLHunyuanVideo",)
    layouts = ("BCFHW", "BFHWC")  # the latents of Kandinsky 5 have the channels last

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read both ratios from the config."""
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]
