"""diffusers' own `vae.encode`."""

from __future__ import annotations

from functools import partial

import torch

from server.engine.stock import StockHalf


class StockEncoder(StockHalf):
    """What a user's local pipeline runs."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.run(partial(self.family.encode, self.vae), pixels)
