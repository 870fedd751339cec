"""FLUX.1: an AutoencoderKL with a shift factor. The pipeline's latents are packed, `[B, (H/16)(W/16), 4C]`."""

from __future__ import annotations

from .kl import KL


class Flux(KL):
    """Selected by `family: flux` in models.yaml, because the VAE's config.json looks like any other AutoencoderKL's."""

    name = "flux"
    is_usually_packed = True
