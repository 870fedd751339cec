"""The posterior's parameters to latents."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def latents_of(parameters: torch.Tensor, seed: int | None) -> torch.Tensor:
    """`[B, 2C, ...]` -> `[B, C, ...]`: the mode, or what `latent_dist.sample` gives with this seed on a CPU."""
    if seed is None:
        return parameters.chunk(2, dim=1)[0]
    drawn: torch.Tensor = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(seed))
    return drawn
