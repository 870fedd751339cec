"""HunyuanVideo 1.5: streamed one latent frame at a time.

diffusers decodes the whole video at once, with an attention mask over all pairs of positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .causal import Past, going_on_from
from .slabs import Part, cut


class HunyuanVideo15:
    """A streamed network. The head ends with the attention over all frames so far; the tail is local in space."""

    def __init__(self, vae: Any) -> None:
        self.decoder = vae.decoder
        self.channels: int = self.decoder.conv_out.conv.out_channels
        steps = [step for block in self.decoder.up_blocks for step in (*block.resnets, *(block.upsamplers or ()))]
        last = self.decoder.norm_out, self.decoder.conv_act, self.decoder.conv_out
        self.parts = tuple(Part(step, (step,)) for step in (*steps, *last))

    def values_per_pixel(self, latent_frames: int) -> float:
        """Return the measured values. The first latent frame decodes to one frame, every other one to four."""
        width: int = self.decoder.conv_out.conv.in_channels
        return width * (50 if latent_frames > 1 else 34)

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Run the decoder up to its attention, frame by frame."""
        decoder = self.decoder
        past: Past = {}
        for frame in torch.split(latents, 1, dim=2):  # [1, C, 1, h, w]
            with going_on_from(past, decoder.conv_in, decoder.mid_block):
                x = decoder.conv_in(frame) + frame.repeat_interleave(decoder.repeat, 1)  # [1, C', 1, h, w]
                x = decoder.mid_block(x)
            yield x

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Run the up blocks and the last layers, frame by frame."""
        past: Past = {}
        for x in chunks:  # [1, C, 1, h, w]
            x = cut(x, cuts[0])
            with going_on_from(past, self.decoder.up_blocks, self.decoder.conv_out):
                for part, rows in zip(self.parts, cuts[1:], strict=True):
                    x = cut(part.run(x), rows)
            yield x
