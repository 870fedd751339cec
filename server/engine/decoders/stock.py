"""diffusers' own `vae.decode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.postprocess import postprocess
from server.families import Family
from server.types import Layout

Emit = Callable[[torch.Tensor], None]


class StockDecoder:
    """What a user's local pipeline runs."""

    name = "diffusers"

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        self.vae = vae
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype
        self.memory_budget_bytes: int | None = None  # the library has no use for it
        self.finite = torch.ones((), dtype=torch.bool)

    def decode(
        self, latents: torch.Tensor, layout: Layout, emit: Emit | None = None, **arguments: float
    ) -> torch.Tensor:
        latents = latents.to(self.device, self.dtype)
        parts = [latents] if self.family.takes_batches else torch.split(latents, 1)
        samples = [self.family.decode(self.vae, part, **arguments) for part in parts]
        sample = samples[0] if len(samples) == 1 else torch.cat(samples)
        self.finite = torch.isfinite(sample).all()
        output = postprocess(sample, layout)
        if emit is not None:
            emit(output)
        return output
