"""Qwen-Image: packed latents of pictures, and a video VAE that decodes them as clips of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .kl import KL

if TYPE_CHECKING:
    import torch


class QwenImage(KL):
    """Unscaled as `QwenImagePipeline.__call__` does: `latents * std + mean`."""

    name = "qwen_image"
    class_names = ("AutoencoderKLQwenImage",)
    channels_key = "z_dim"
    is_usually_packed = True
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** len(config["temperal_downsample"]), 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """The VAE's own layout too: `[B, C, 1, H, W]`."""
        is_clip_of_one = len(shape) == 5 and shape[2] == 1
        return super().decode_geometry(spec, shape[:2] + shape[3:] if is_clip_of_one else shape, sent)

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        return super().decode(vae, latents[:, :, None], **arguments)[:, :, 0]  # [B, C, 1, h, w] -> [B, 3, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(vae, pixels[:, :, None])[:, :, 0]  # [B, 3, 1, H, W] -> [B, 2C, h, w]


class QwenImage21(QwenImage):
    """Tokens of one latent pixel each, and pictures with an alpha channel."""

    name = "qwen_image_21"
    class_names = ("AutoencoderKLQwenImage21",)
    patch_size = 1

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["scale_factor_spatial"], 1

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        return replace(super().describe(config), image_channels=config["in_channels"])
