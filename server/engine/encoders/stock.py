"""diffusers' own `vae.encode`."""

from __future__ import annotations

from functools import partial

import torch

from server.engine.coder import Check, Coded, go_on
from server.engine.stock import StockHalf


class StockEncoder(StockHalf):
    """What a user's local pipeline runs."""

    def encode(self, pixels: torch.Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says; the budget has no effect, because the library knows none."""
        return self.run(partial(self.family.encode, self.vae), pixels, check)
