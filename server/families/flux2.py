"""FLUX.2: latents in 2x2 patches of 128 channels, scaled by the running statistics of a batch norm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Sent, shape_text
from .kl import KL, patchify, unpatchify

if TYPE_CHECKING:
    import torch


class Flux2(KL):
    """Unscales the patches and then unpatchifies them, as `Flux2Pipeline.__call__` does."""

    name = "flux2"
    class_names = ("AutoencoderKLFlux2",)
    is_usually_packed = True
    is_scaled_in_comfyui = True  # ComfyUI's VAE has the batch norm; latent_formats.Flux2 changes nothing
    gpu_dtype = "bfloat16"
    fixed_eps: ClassVar[float | None] = None  # used in place of the config's `batch_norm_eps`

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """Read the statistics, one value for each of the 128 patch channels, from the batch norm of the VAE."""
        return self.with_statistics(spec, *self.statistics(vae))

    def statistics(self, vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the standard deviation of each patch channel, `[4 C]` each."""
        eps = vae.config.batch_norm_eps if self.fixed_eps is None else self.fixed_eps
        return vae.bn.running_mean.float(), (vae.bn.running_var.float() + eps).sqrt()

    def with_statistics(self, spec: LatentSpec, mean: torch.Tensor, std: torch.Tensor) -> LatentSpec:
        """Return the spec with these statistics."""
        return replace(spec, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))

    def grid(self, spec: LatentSpec) -> int:
        """Return 16 pixels for a VAE with a ratio of 8: latents consist of whole patches."""
        return 2 * spec.vae_scale_factor

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept tokens `[B, S, 128]`, patches `[B, 128, H / 2, W / 2]`, and unpatched latents `[B, 32, H, W]`."""
        if len(shape) == 4 and shape[1] == 4 * spec.channels:
            shape = shape[0], spec.channels, 2 * shape[2], 2 * shape[3]
        found = super().decode_geometry(spec, shape, sent)
        if any(side % 2 for side in found.latent_shape[2:]):
            raise WrongShape(f"latents {shape_text(shape)} do not split into 2x2 patches; send even heights and widths")
        return found

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Unscale the patches, then undo them. Unpatched latents without any scaling pass unchanged."""
        if latents.ndim == 4 and latents.shape[1] == 4 * spec.channels:
            return unpatchify(self.unscale(latents, spec, scaling))
        unpacked = self.unpack(latents, geometry)  # [B, C, h, w]
        return unpatchify(self.unscale(patchify(unpacked), spec, scaling)) if scaling != Scaling() else unpacked

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Return patches, scaled, if the model's own statistics are used, else unpatched latents."""
        return self.scale(patchify(latents) if scaling.from_model else latents, spec, scaling)
