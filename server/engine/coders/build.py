"""Which coder runs a VAE: this server's own where the structure is known, diffusers' own everywhere else.

`exact` coders have their own layers. The `streaming` decoder runs diffusers' layers on one piece of the video after the
other. Both return what diffusers' plain decode or encode returns.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLHunyuanVideo

from ...families import Family
from ...model_info import Direction
from .image import structure
from .image.decoder import ExactKLDecoder
from .image.encoder import ExactKLEncoder
from .interface import Decoder, Encoder
from .stock import StockDecoder, StockEncoder
from .video.causal_decoder import CAUSAL_CLASSES, ExactCausalDecoder
from .video.causal_encoder import ExactCausalEncoder
from .video.hunyuan_decoder import ExactHunyuanVideoDecoder
from .video.hunyuan_encoder import ExactHunyuanVideoEncoder
from .video.streaming import NETWORKS, StreamingDecoder

EXACT_CLASSES = {
    Direction.DECODE: structure.CLASSES | {"AutoencoderKLHunyuanVideo"} | CAUSAL_CLASSES,
    Direction.ENCODE: structure.CLASSES | {"AutoencoderKLHunyuanVideo"} | CAUSAL_CLASSES,
}
EXACT_DECODERS: tuple[type[ExactKLDecoder] | type[ExactHunyuanVideoDecoder] | type[ExactCausalDecoder], ...] = (
    ExactKLDecoder,
    ExactHunyuanVideoDecoder,
    ExactCausalDecoder,
)


def build_coder(
    vae: Any, family: Family, direction: Direction, choice: str, tiling: str
) -> tuple[Decoder | Encoder, str | None]:
    """Return the coder for one direction of a VAE, and the reason if it is diffusers' own.

    choice: the entry's `decoder`. `auto` prefers this server's own coders, which take over the weights of `vae`;
        `diffusers` and `plain` run diffusers' own, bit for bit.
    tiling: `diffusers` enables diffusers' tiles, whose blending is not exact.
    """
    stock = StockEncoder if direction is Direction.ENCODE else StockDecoder
    if tiling == "diffusers":
        vae.enable_tiling()
        return stock(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return stock(vae, family), f"models.yaml asks for diffusers' own {direction}r"
    coder, reason = _own_encoder(vae) if direction is Direction.ENCODE else _own_decoder(vae, family)
    return (coder, None) if coder else (stock(vae, family), reason)


def _own_encoder(vae: Any) -> tuple[Encoder | None, str | None]:
    encoder: type[ExactKLEncoder] | type[ExactCausalEncoder] | type[ExactHunyuanVideoEncoder] = ExactKLEncoder
    if type(vae).__name__ in CAUSAL_CLASSES:
        encoder = ExactCausalEncoder
    elif isinstance(vae, AutoencoderKLHunyuanVideo):
        encoder = ExactHunyuanVideoEncoder
    reason = encoder.unsupported_reason(vae)
    return (None, reason) if reason else (encoder(vae), None)


def _own_decoder(vae: Any, family: Family) -> tuple[Decoder | None, str | None]:
    reasons = {decoder: decoder.unsupported_reason(vae) for decoder in EXACT_DECODERS}
    for decoder, reason in reasons.items():
        if reason is None:
            return decoder(vae), None
    if type(vae).__name__ in NETWORKS:
        reason = StreamingDecoder.unsupported_reason(vae)
        return (None, reason) if reason else (StreamingDecoder(vae, family), None)
    if type(vae).__name__ in CAUSAL_CLASSES:
        return None, reasons[ExactCausalDecoder]
    return None, reasons[ExactHunyuanVideoDecoder if isinstance(vae, AutoencoderKLHunyuanVideo) else ExactKLDecoder]


__all__ = ["EXACT_CLASSES", "build_coder"]
