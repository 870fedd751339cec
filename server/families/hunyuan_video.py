"""HunyuanVideo: `[B, C, F, H, W]` to a clip of `4 (F - 1) + 1` frames, each 8 times as high and wide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import WrongShape
from server.families.base import Family, PixelSize, times, wrong_channels
from server.types import Geometry, LatentSpec


class HunyuanVideo(Family):
    """Statistics as `HunyuanVideoPipeline.__call__` uses them: the scaling factor alone."""

    name = "hunyuan_video"
    kind = "video"
    class_names = ("AutoencoderKLHunyuanVideo",)
    config_defaults = {
        "latent_channels": 16,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]

    def geometry(self, spec: LatentSpec, shape: tuple[int, ...], size: PixelSize) -> Geometry:
        """`size` is never asked: clients send nonsense for videos, and the shape says it all."""
        is_one_clip = len(shape) == 4
        if is_one_clip:
            shape = (1, *shape)
        if len(shape) != 5:
            raise WrongShape(
                f"shape {times(shape)} has {len(shape)} dimensions; this model takes video latents "
                f"[B, {spec.channels}, F, H, W]"
            )
        if shape[1] != spec.channels and is_one_clip:
            raise WrongShape(
                f"shape {times(shape[1:])} is not one clip [{spec.channels}, F, H, W] of this model; "
                f"send video latents [B, {spec.channels}, F, H, W]"
            )
        if shape[1] != spec.channels:
            raise wrong_channels(spec, shape[1], f"[B, {spec.channels}, F, H, W]")
        frames, height, width = shape[2:]
        return Geometry(
            shape,
            is_packed=False,
            num_frames=(frames - 1) * spec.temporal_compression_ratio + 1,
            height=height * spec.vae_scale_factor,
            width=width * spec.vae_scale_factor,
        )
