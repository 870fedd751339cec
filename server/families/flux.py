"""FLUX.1: an AutoencoderKL with a shift, whose pipeline emits packed latents `[B, (H/16)(W/16), 4C]`."""

from __future__ import annotations

from .kl import KL


class Flux(KL):
    """Named in models.yaml: the VAE's config.json does not tell it from any other AutoencoderKL."""

    name = "flux"
    is_usually_packed = True
