"""Which encoder runs a VAE."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from server.engine.encoders.stock import StockEncoder
from server.families import Family


class Encoder(Protocol):
    """A VAE's encoder on its device. The attributes are those of a Decoder."""

    name: str
    finite: torch.Tensor
    memory_budget_bytes: int | None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[B, 3, (F,) H, W]` in [-1, 1], on any device and dtype, to the posterior's parameters `[B, 2C, ...]`."""
        ...


def build_encoder(
    vae: Any, family: Family, choice: str, tiling: str, memory_budget_bytes: int | None
) -> tuple[Encoder, str | None]:
    return StockEncoder(vae, family), None
