"""What diffusers' own decoder and encoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.coder import Check, Coded, checking
from server.families import Family


class StockHalf:
    """One direction of a VAE as a user's local pipeline runs it."""

    name = "diffusers"
    is_reentrant = False  # some classes keep a cache of frames between their chunks

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        self.vae = vae
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype

    def run(self, compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, check: Check) -> Coded:
        """Compute the whole batch at once, or one after another where diffusers takes no batches."""
        batch = batch.to(self.device, self.dtype)
        parts = [batch] if self.family.takes_batches else torch.split(batch, 1)
        with checking(self.vae, check):
            outputs = [compute(part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return Coded(output, torch.isfinite(output).all())
