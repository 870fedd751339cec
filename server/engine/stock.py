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

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        self.vae = vae
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype

    def run(self, compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, check: Check) -> Coded:
        """Compute a batch `[B, …]`. check: called before each layer.

        On a CPU images and videos are computed one by one: torch's kernels round differently with the size of the
        batch, and a request's answer must not depend on the others. So are those of a family that takes no batches.
        """
        batch = batch.to(self.device, self.dtype)
        is_one_by_one = self.device.type == "cpu" or not self.family.takes_batches
        parts = torch.split(batch, 1) if is_one_by_one else [batch]
        with checking(self.vae, check):
            outputs = [compute(part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return Coded(output, torch.isfinite(output).all())
