"""Models that use FLUX.2's VAE, but scale or order its latents in another way. An entry of models.yaml names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .flux2 import Flux2
from .kl import patchify, unpatchify

if TYPE_CHECKING:
    import torch


class ErnieImage(Flux2):
    """ERNIE-Image, whose `ErnieImagePipeline.__call__` does not use the `batch_norm_eps` of the config."""

    name = "ernie_image"
    fixed_eps = 1e-5


class Ideogram4(Flux2):
    """Ideogram 4. The channels of its patches come last, as in `Ideogram4Pipeline.__call__`.

    A token `[2 * 2 * C]` has the row and the column in its patch before the channel, and so have the statistics.
    """

    name = "ideogram4"

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """Read the statistics in the order of FLUX.2's patches."""
        return self.with_statistics(spec, *(channels_first(each, spec.channels) for each in self.statistics(vae)))

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Bring tokens or patches to the order of FLUX.2's, and unscale them like those."""
        depth = -1 if geometry.is_packed else 1
        if geometry.is_packed or latents.shape[1] == 4 * spec.channels:
            latents = channels_first(latents.movedim(depth, -1), spec.channels).movedim(-1, depth)
        return super().latents_in(latents, spec, geometry, scaling)

    def comfyui_latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry) -> torch.Tensor:
        """Unscale patches in the order of FLUX.2's, whose VAE ComfyUI uses unchanged."""
        return super().latents_in(latents, spec, geometry, Scaling(from_model=True))

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Return unpatched latents, which `Ideogram4DecodeStep` takes. The model's own statistics are for patches."""
        if not scaling.from_model:
            return self.scale(latents, spec, scaling)
        return unpatchify(self.scale(patchify(latents), spec, scaling))


def channels_first(patches: torch.Tensor, channels: int) -> torch.Tensor:
    """Return patches `[..., 2 * 2 * C]` with the channel first, `[..., C * 2 * 2]`."""
    return patches.unflatten(-1, (2, 2, channels)).movedim(-1, -3).flatten(-3)  # type: ignore[no-untyped-call,no-any-return]  # torch
