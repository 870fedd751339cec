"""Which encoder runs a VAE: ours where its structure is known. diffusers' own, everywhere else, needs no class here."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from server.engine.encoders.exact import ExactKLEncoder


class Encoder(Protocol):
    """The other half of a VAE on its device.

    name: what `GET /models` calls this way of encoding. finite: whether the last encode's result was, a 0-d tensor.
    memory_budget_bytes: bounds the activations; None is what is free at each encode.
    """

    name: str
    finite: torch.Tensor
    memory_budget_bytes: int | None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` in [-1, 1], on any device and in any dtype, to the posterior's parameters.

        They are `[B, 2 C, h, w]` in the model's dtype, mean and logarithm of the variance: what diffusers'
        `vae.encode(pixels).latent_dist.parameters` holds. H and W are multiples of the VAE's scale factor.
        """
        ...


def build_encoder(
    vae: Any, choice: str, tiling: str, memory_budget_bytes: int | None
) -> tuple[Encoder | None, str | None]:
    """The exact encoder, or None and why diffusers' own is to run. It takes the weights of the VAE's encoder over.

    choice: `auto`, or `diffusers` for the stock path bit for bit. tiling: `diffusers` for the library's own tiles.
    memory_budget_bytes: bounds the activations; None: what is free at each encode.
    """
    if tiling == "diffusers":
        return None, "models.yaml asks for diffusers' tiles"
    if choice == "diffusers":
        return None, "models.yaml asks for diffusers' own encoder"
    reason = ExactKLEncoder.unsupported_reason(vae)
    if reason is not None:
        return None, reason
    return ExactKLEncoder(vae, memory_budget_bytes=memory_budget_bytes), None


__all__ = ["Encoder", "build_encoder"]
