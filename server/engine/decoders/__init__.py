"""Which decoder runs a VAE: ours where its structure is known, diffusers' own everywhere else.

`exact` has layers of its own, `streaming` runs diffusers' layers piece by piece; both give what a plain decode gives.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLHunyuanVideo

from server.engine.decoders.stock import Emit, StockDecoder
from server.engine.decoders.streaming import NETWORKS, StreamingDecoder
from server.engine.exact import ExactHunyuanVideoDecoder, ExactKLDecoder
from server.families import Family
from server.types import Layout, Operation


class Decoder(Protocol):
    """A VAE on its device.

    name: what `GET /models` calls this way of decoding. finite: whether the last decode's sample was, a 0-d tensor.
    memory_budget_bytes: bounds the activations of all but diffusers' own; None is what is free at each decode.
    """

    name: str
    finite: torch.Tensor
    memory_budget_bytes: int | None

    def decode(
        self, latents: torch.Tensor, layout: Layout, emit: Emit | None = None, **arguments: float
    ) -> torch.Tensor:
        """`[B, C, h, w]` or `[B, C, F, h, w]`, unscaled, on any device and dtype, to pixels as `layout` says.

        emit: receives the pictures or frames in order, on the device, each as soon as it is done.
        arguments: of the family's own `vae.decode`.
        """
        ...


EXACT_CLASSES = {
    Operation.DECODE: frozenset({"AutoencoderKL", "AutoencoderKLHunyuanVideo"}),
    Operation.ENCODE: frozenset({"AutoencoderKL"}),
}
EXACT: tuple[type[ExactKLDecoder] | type[ExactHunyuanVideoDecoder], ...] = (ExactKLDecoder, ExactHunyuanVideoDecoder)


def build_decoder(
    vae: Any, family: Family, choice: str, tiling: str, memory_budget_bytes: int | None
) -> tuple[Decoder, str | None]:
    """The decoder, and why it is diffusers' own where it is.

    choice: `auto`; `diffusers` and `plain`: the stock path, bit for bit. An exact decoder takes the VAE's weights over.
    tiling: `diffusers` for the library's own tiles and their blending, which are not exact.
    memory_budget_bytes: bounds an exact decoder's activations; None: what is free at each decode.
    """
    if tiling == "diffusers":
        vae.enable_tiling()
        return StockDecoder(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return StockDecoder(vae, family), "models.yaml asks for diffusers' own decoder"
    reasons = [exact.unsupported_reason(vae) for exact in EXACT]
    for exact, reason in zip(EXACT, reasons, strict=True):
        if reason is None:
            return exact(vae, memory_budget_bytes=memory_budget_bytes), None
    if type(vae).__name__ in NETWORKS:
        return _streaming(vae, family, memory_budget_bytes)
    return StockDecoder(vae, family), reasons[-1] if isinstance(vae, AutoencoderKLHunyuanVideo) else reasons[0]


def _streaming(vae: Any, family: Family, memory_budget_bytes: int | None) -> tuple[Decoder, str | None]:
    reason = StreamingDecoder.unsupported_reason(vae)
    if reason is not None:
        return StockDecoder(vae, family), reason
    return StreamingDecoder(vae, family, memory_budget_bytes=memory_budget_bytes), None


__all__ = ["EXACT_CLASSES", "Decoder", "build_decoder"]
