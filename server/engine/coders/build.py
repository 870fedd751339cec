"""Which coder runs a VAE: this server's own where the structure is known, diffusers' own everywhere else.

`exact` coders have their own layers and return what diffusers' plain decode or encode returns.
"""

from __future__ import annotations

from typing import Any

from ...families import Family
from ...model_info import Direction
from .image import structure
from .image.decoder import ExactKLDecoder
from .image.encoder import ExactKLEncoder
from .interface import Decoder, Encoder
from .neighborhood import use_blocks
from .stock import StockDecoder, StockEncoder
from .video.causal_decoder import DECODED_CLASSES, ExactCausalDecoder
from .video.causal_encoder import ENCODED_CLASSES, ExactCausalEncoder
from .video.ltx_decoder import LTX_CLASSES, ExactLTXDecoder
from .video.tiny_decoder import TinyVideoDecoder
from .video.tiny_layers import TAEHV

EXACT_CLASSES = {
    Direction.DECODE: structure.CLASSES | DECODED_CLASSES | LTX_CLASSES,
    Direction.ENCODE: structure.CLASSES | ENCODED_CLASSES,
}
ExactDecoder = ExactKLDecoder | ExactCausalDecoder | ExactLTXDecoder
ExactEncoder = ExactKLEncoder | ExactCausalEncoder


def build_coder(
    vae: Any, family: Family, direction: Direction, choice: str, tiling: str
) -> tuple[Decoder | Encoder, str | None]:
    """Return the coder for one direction of a VAE, and a sentence if it is diffusers' own or has slower kernels.

    choice: the entry's `decoder`. `auto` prefers this server's own coders, which take over the weights of `vae`;
        `diffusers` and `plain` run diffusers' own, bit for bit.
    tiling: `diffusers` enables diffusers' tiles, whose blending is not exact.
    """
    stock = StockEncoder if direction is Direction.ENCODE else StockDecoder
    if choice == "auto":
        use_blocks(vae)
    if tiling == "diffusers":
        vae.enable_tiling()
        return stock(vae, family), "models.yaml asks for diffusers' tiles"
    if choice != "auto":
        return stock(vae, family), f"models.yaml asks for diffusers' own {direction}r"
    if isinstance(vae, TAEHV):
        return (TinyVideoDecoder(vae) if direction is Direction.DECODE else stock(vae, family)), None
    coder, reason = _own_encoder(vae) if direction is Direction.ENCODE else _own_decoder(vae)
    return (coder, coder.kernels.note) if coder else (stock(vae, family), reason)


def _own_encoder(vae: Any) -> tuple[ExactEncoder | None, str | None]:
    encoder: type[ExactEncoder] = (
        ExactCausalEncoder if type(vae).__name__ in DECODED_CLASSES | ENCODED_CLASSES else ExactKLEncoder
    )
    reason = encoder.unsupported_reason(vae)
    return (None, reason) if reason else (encoder(vae), None)


def _own_decoder(vae: Any) -> tuple[ExactDecoder | None, str | None]:
    name = type(vae).__name__
    decoder: type[ExactDecoder] = (
        ExactCausalDecoder if name in DECODED_CLASSES else ExactLTXDecoder if name in LTX_CLASSES else ExactKLDecoder
    )
    reason = decoder.unsupported_reason(vae)
    return (None, reason) if reason else (decoder(vae), None)


__all__ = ["EXACT_CLASSES", "build_coder"]
