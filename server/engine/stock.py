"""What diffusers' own decoder and encoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.families import Family


class StockHalf:
    """One direction of a VAE as a user's local pipeline runs it."""

    name = "diffusers"

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        self.vae = vae
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype
        self.memory_budget_bytes: int | None = None  # the library has no use for it
        self.finite = torch.ones((), dtype=torch.bool)

    def run(self, compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """compute: of the whole batch, or of each of it where diffusers takes no batches."""
        batch = batch.to(self.device, self.dtype)
        parts = [batch] if self.family.takes_batches else torch.split(batch, 1)
        outputs = [compute(part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        self.finite = torch.isfinite(output).all()
        return output
