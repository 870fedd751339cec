"""The VAE of the refiner of HunyuanImage 2.1: images whose latents the pipeline holds twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Sent
from .kl import KL

if TYPE_CHECKING:
    import torch


class HunyuanImageRefiner(KL):
    """Unscales with only the scaling factor, as `HunyuanImageRefinerPipeline.__call__` does.

    The pipeline's latents are `[B, 2 C, 1, h, w]`. It drops the first half of the channels and decodes the other
    one, as a video of one frame.
    """

    name = "hunyuan_image_refiner"
    class_names = ("AutoencoderKLHunyuanImageRefiner",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read the spatial ratio from the config."""
        return config["spatial_compression_ratio"], 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept the pipeline's `[B, 2 C, 1, H, W]`, the VAE's `[B, C, 1, H, W]`, and both without the axis of 1."""
        if len(shape) == 5 and shape[2] == 1:
            shape = shape[:2] + shape[3:]
        if len(shape) == 4 and shape[1] == 2 * spec.channels:
            shape = (shape[0], spec.channels, *shape[2:])
        return super().decode_geometry(spec, shape, sent)

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Drop the first half of the pipeline's channels, and unscale."""
        if latents.ndim > 3 and latents.shape[1] == 2 * spec.channels:
            latents = latents[:, spec.channels :]
        return super().latents_in(latents, spec, geometry, scaling)

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode each image as a video of one frame."""
        return super().decode(vae, latents[:, :, None], **arguments)[:, :, 0]  # [B, C, 1, h, w] -> [B, 3, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode each image as a video of one frame."""
        return super().encode(vae, pixels[:, :, None])[:, :, 0]  # [B, 3, 1, H, W] -> [B, 2C, h, w]

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Return `[B, 2 C, 1, h, w]` if the model's own statistics are used, as the pipeline holds them."""
        scaled = self.scale(latents, spec, scaling)  # [B, C, h, w]
        return scaled.repeat(1, 2, 1, 1)[:, :, None] if scaling.from_model else scaled
