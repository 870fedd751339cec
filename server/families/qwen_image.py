"""Qwen-Image: packed image latents, and a video VAE that decodes each image as a video of one frame."""

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
    """Unscales with `latents * std + mean`, as `QwenImagePipeline.__call__` does."""

    name = "qwen_image"
    class_names = ("AutoencoderKLQwenImage",)
    channels_key = "z_dim"
    is_usually_packed = True
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each downsample, and 1."""
        return 2 ** len(config["temperal_downsample"]), 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept what `KL.decode_geometry` accepts, and the VAE's own layout `[B, C, 1, H, W]`."""
        is_one_frame = len(shape) == 5 and shape[2] == 1
        return super().decode_geometry(spec, shape[:2] + shape[3:] if is_one_frame else shape, sent)

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """Decode each image as a video of one frame."""
        return super().decode(vae, latents[:, :, None], **arguments)[:, :, 0]  # [B, C, 1, h, w] -> [B, 3, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode each image as a video of one frame."""
        return super().encode(vae, pixels[:, :, None])[:, :, 0]  # [B, 3, 1, H, W] -> [B, 2C, h, w]


class QwenImage21(QwenImage):
    """Qwen-Image 2.1: a token is one latent pixel, and the images have an alpha channel."""

    name = "qwen_image_21"
    class_names = ("AutoencoderKLQwenImage21",)
    patch_size = 1

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read the spatial ratio from the config."""
        return config["scale_factor_spatial"], 1

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read also how many channels the images have."""
        return replace(super().describe(config), image_channels=config["in_channels"])
