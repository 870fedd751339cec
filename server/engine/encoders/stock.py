"""diffusers' own `vae.encode`."""

from __future__ import annotations

from typing import Any

import torch

from server.families import Family


class StockEncoder:
    """What a user's local pipeline runs."""

    name = "diffusers"

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        self.vae = vae
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype
        self.memory_budget_bytes: int | None = None  # the library has no use for it
        self.finite = torch.ones((), dtype=torch.bool)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.device, self.dtype)
        parts = [pixels] if self.family.takes_batches else torch.split(pixels, 1)
        encoded = [self.family.encode(self.vae, part) for part in parts]
        parameters = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        self.finite = torch.isfinite(parameters).all()
        return parameters
