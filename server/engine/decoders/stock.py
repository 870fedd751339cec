"""diffusers' own `vae.decode`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.engine.postprocess import postprocess
from server.engine.stock import StockHalf
from server.types import Layout

Emit = Callable[[torch.Tensor], None]


class StockDecoder(StockHalf):
    """What a user's local pipeline runs."""

    def decode(
        self, latents: torch.Tensor, layout: Layout, emit: Emit | None = None, **arguments: float
    ) -> torch.Tensor:
        sample = self.run(lambda part: self.family.decode(self.vae, part, **arguments), latents)
        output = postprocess(sample, layout)
        if emit is not None:
            emit(output)
        return output
