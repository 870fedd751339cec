"""Which encoder runs a VAE: ours where its structure is known, diffusers' own everywhere else."""

from __future__ import annotations

from typing import Any

from server.engine.coder import Encoder
from server.engine.encoders.stock import StockEncoder
from server.engine.exact import ExactKLEncoder
from server.families import Family


def build_encoder(vae: Any, family: Family, choice: str, tiling: str) -> tuple[Encoder, str | None]:
    """The encoder, and why it is diffusers' own where it is. An exact one takes the weights of `vae.encoder` over.

    choice: `auto`; `diffusers` and `plain`: the stock path, bit for bit. tiling: `diffusers` for its own tiles.
    """
    if tiling == "diffusers":
        vae.enable_tiling()
        return StockEncoder(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return StockEncoder(vae, family), "models.yaml asks for diffusers' own encoder"
    reason = ExactKLEncoder.unsupported_reason(vae)
    if reason is not None:
        return StockEncoder(vae, family), reason
    return ExactKLEncoder(vae), None


__all__ = ["build_encoder"]
