"""HunyuanVideo: `[B, C, F, H, W]` to a clip of `4 (F - 1) + 1` frames, each 8 times as high and wide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .video_base import Video


class HunyuanVideo(Video):
    """Statistics as `HunyuanVideoPipeline.__call__` uses them: the scaling factor alone."""

    name = "hunyuan_video"
    class_names = ("AutoencoderKLHunyuanVideo",)
    layouts = ("BCFHW", "BFHWC")  # Kandinsky 5's latents have the channels last

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]
