"""Which encoder runs a VAE: ours where its structure is known, diffusers' own everywhere else."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from server.engine.encoders.stock import StockEncoder
from server.engine.exact import ExactKLEncoder
from server.families import Family


class Encoder(Protocol):
    """The other half of a VAE on its device.

    name: what `GET /models` calls this way of encoding. finite: whether the last encode's result was, a 0-d tensor.
    memory_budget_bytes: bounds the activations; None is what is free at each encode.
    """

    name: str
    finite: torch.Tensor
    memory_budget_bytes: int | None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[B, 3, (F,) H, W]` in [-1, 1], on any device and in any dtype, to the posterior's parameters.

        They are `[B, 2 C, (f,) h, w]` in the model's dtype, mean and logarithm of the variance: what diffusers'
        `vae.encode(pixels).latent_dist.parameters` holds; or the latents, where there is no posterior. H and W are
        multiples of the VAE's scale factor.
        """
        ...


def build_encoder(
    vae: Any, family: Family, choice: str, tiling: str, memory_budget_bytes: int | None
) -> tuple[Encoder, str | None]:
    """The encoder, and why it is diffusers' own where it is. An exact one takes the weights of `vae.encoder` over.

    choice: `auto`; `diffusers` and `plain`: the stock path, bit for bit. tiling: `diffusers` for its own tiles.
    memory_budget_bytes: bounds the activations; None: what is free at each encode.
    """
    if tiling == "diffusers":
        vae.enable_tiling()
        return StockEncoder(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return StockEncoder(vae, family), "models.yaml asks for diffusers' own encoder"
    reason = ExactKLEncoder.unsupported_reason(vae)
    if reason is not None:
        return StockEncoder(vae, family), reason
    return ExactKLEncoder(vae, memory_budget_bytes=memory_budget_bytes), None


__all__ = ["Encoder", "build_encoder"]
