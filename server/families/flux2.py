"""FLUX.2: latents in 2x2 patches of 128 channels, which a batch norm's running statistics scale."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Sent, shape_text
from .kl import KL, patchify, unpatchify

if TYPE_CHECKING:
    import torch


class Flux2(KL):
    """Unscaled as `Flux2Pipeline.__call__` does: before the patches are undone."""

    name = "flux2"
    class_names = ("AutoencoderKLFlux2",)
    is_usually_packed = True
    gpu_dtype = "bfloat16"

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
        return replace(spec, latents_mean=tuple(vae.bn.running_mean.float().tolist()), latents_std=tuple(std.tolist()))

    def grid(self, spec: LatentSpec) -> int:
        return 2 * spec.vae_scale_factor

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Tokens `[B, S, 128]`, patches `[B, 128, H / 2, W / 2]`, or what the VAE takes, `[B, 32, H, W]`."""
        if len(shape) == 4 and shape[1] == 4 * spec.channels:
            shape = shape[0], spec.channels, 2 * shape[2], 2 * shape[3]
        found = super().decode_geometry(spec, shape, sent)
        if any(side % 2 for side in found.latent_shape[2:]):
            raise WrongShape(f"latents {shape_text(shape)} do not make whole 2x2 patches; send even heights and widths")
        return found

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        if latents.ndim == 4 and latents.shape[1] == 4 * spec.channels:
            return unpatchify(self.unscale(latents, spec, scaling))
        unpacked = self.unpack(latents, geometry)  # [B, C, h, w]
        return unpatchify(self.unscale(patchify(unpacked), spec, scaling)) if scaling != Scaling() else unpacked

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """With the model's own statistics in patches, as the pipeline keeps them."""
        return self.scale(patchify(latents) if scaling.from_model else latents, spec, scaling)
