"""Latents from the parameters of the posterior."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def latents_of(parameters: torch.Tensor, seed: int | None) -> torch.Tensor:
    """Return the latents `[B, C, ...]` of a posterior with the parameters `[B, 2C, ...]`.

    seed: if None, the latents are the mode of the posterior. Otherwise they are the sample that diffusers'
        `latent_dist.sample` draws with a CPU generator of this seed.
    """
    if seed is None:
        return parameters.chunk(2, dim=1)[0]
    drawn: torch.Tensor = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(seed))
    return drawn
