"""Which decoder runs a VAE: ours where its structure is known, diffusers' own everywhere else.

`exact` has layers of its own, `streaming` runs diffusers' layers piece by piece; both give what a plain decode gives.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLHunyuanVideo

from server.engine.coder import Decoder
from server.engine.decoders.stock import StockDecoder
from server.engine.decoders.streaming import NETWORKS, StreamingDecoder
from server.engine.exact import ExactHunyuanVideoDecoder, ExactKLDecoder
from server.families import Family
from server.types import Operation

EXACT_CLASSES = {
    Operation.DECODE: frozenset({"AutoencoderKL", "AutoencoderKLHunyuanVideo"}),
    Operation.ENCODE: frozenset({"AutoencoderKL"}),
}
EXACT: tuple[type[ExactKLDecoder] | type[ExactHunyuanVideoDecoder], ...] = (ExactKLDecoder, ExactHunyuanVideoDecoder)


def build_decoder(vae: Any, family: Family, choice: str, tiling: str) -> tuple[Decoder, str | None]:
    """The decoder, and why it is diffusers' own where it is.

    choice: `auto`; `diffusers` and `plain`: the stock path, bit for bit. An exact decoder takes the VAE's weights over.
    tiling: `diffusers` for the library's own tiles and their blending, which are not exact.
    """
    if tiling == "diffusers":
        vae.enable_tiling()
        return StockDecoder(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return StockDecoder(vae, family), "models.yaml asks for diffusers' own decoder"
    reasons = [exact.unsupported_reason(vae) for exact in EXACT]
    for exact, reason in zip(EXACT, reasons, strict=True):
        if reason is None:
            return exact(vae), None
    if type(vae).__name__ in NETWORKS:
        return _streaming(vae, family)
    return StockDecoder(vae, family), reasons[-1] if isinstance(vae, AutoencoderKLHunyuanVideo) else reasons[0]


def _streaming(vae: Any, family: Family) -> tuple[Decoder, str | None]:
    reason = StreamingDecoder.unsupported_reason(vae)
    if reason is not None:
        return StockDecoder(vae, family), reason
    return StreamingDecoder(vae, family), None


__all__ = ["EXACT_CLASSES", "build_decoder"]
