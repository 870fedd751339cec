"""diffusers' own `vae.decode`."""

from __future__ import annotations

import torch

from server.engine.coder import Check, Coded, Emit, go_on
from server.engine.postprocess import postprocess
from server.engine.stock import StockHalf
from server.types import Layout


class StockDecoder(StockHalf):
    """What a user's local pipeline runs."""

    def decode(
        self,
        latents: torch.Tensor,
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says; the budget has no effect, because the library knows none."""
        sample = self.run(lambda part: self.family.decode(self.vae, part, **arguments), latents, check)
        output = postprocess(sample.tensor, layout)
        if emit is not None:
            emit(output)
        return Coded(output, sample.finite)
