"""diffusers' own `vae.decode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.postprocess import postprocess
from server.types import Layout

Emit = Callable[[torch.Tensor], None]


class StockDecoder:
    """What a user's local pipeline runs."""

    name = "diffusers"

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.memory_budget_bytes: int | None = None  # the library has no use for it
        self.finite = torch.ones((), dtype=torch.bool)

    def decode(self, latents: torch.Tensor, layout: Layout, emit: Emit | None = None) -> torch.Tensor:
        parameter = next(self.vae.parameters())
        sample = self.vae.decode(latents.to(parameter.device, parameter.dtype), return_dict=False)[0]
        self.finite = torch.isfinite(sample).all()
        output = postprocess(sample, layout)
        if emit is not None:
            emit(output)
        return output
