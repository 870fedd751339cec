"""Which decoder runs a VAE: ours where its structure is known, diffusers' own everywhere else."""

from __future__ import annotations

from typing import Protocol

import torch

from server.engine.decoders.exact import ExactKLDecoder
from server.engine.decoders.stock import StockDecoder
from server.types import Layout


class Decoder(Protocol):
    """A VAE on its device; `name` is what `GET /models` calls this way of decoding."""

    name: str

    def decode(self, latents: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`[B, C, h, w]` or `[B, C, F, h, w]`, unscaled, on any device and dtype, to pixels as `layout` says."""
        ...


def build_decoder(vae: torch.nn.Module, choice: str, memory_budget_bytes: int | None) -> tuple[Decoder, str | None]:
    """The decoder, and why it is diffusers' own where it is.

    choice: `auto`, or `diffusers` for the stock path bit for bit. The exact decoder takes the VAE's weights over.
    memory_budget_bytes: bounds the exact decoder's activations; None: what is free at each decode.
    """
    if choice == "diffusers":
        return StockDecoder(vae), "models.yaml asks for diffusers' own decoder"
    reason = ExactKLDecoder.unsupported_reason(vae)
    if reason is None:
        return ExactKLDecoder(vae, memory_budget_bytes=memory_budget_bytes), None
    return StockDecoder(vae), reason


__all__ = ["Decoder", "build_decoder"]
