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
        parameters = self.family.encode(self.vae, pixels.to(self.device, self.dtype))
        self.finite = torch.isfinite(parameters).all()
        return parameters
