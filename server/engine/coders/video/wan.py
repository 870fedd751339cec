"""Wan 2.1, Wan 2.2 and Qwen-Image: streamed one latent frame at a time, with diffusers' own cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .slabs import Part, cut, unpatchify


class Cache:
    """The cache of diffusers' modules: the last two frames of each convolution, and a position in that list."""

    def __init__(self) -> None:
        self.frames: dict[int, Any] = defaultdict(lambda: None)
        self.position = [0]

    def arguments(self) -> dict[str, Any]:
        """Return the cache as arguments of diffusers' modules."""
        return {"feat_cache": self.frames, "feat_idx": self.position}

    def rewind(self) -> None:
        """Start the next pass at the first convolution."""
        self.position[0] = 0

    def convolve(self, conv: Any, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', n, H, W]
        """Apply a convolution with the cache, as diffusers' blocks do with each of their own convolutions."""
        before = self.frames[self.position[0]]
        is_single = x.shape[2] == 1 and before is not None
        self.frames[self.position[0]] = torch.cat([before[:, :, -1:], x], 2) if is_single else x[:, :, -2:].clone()
        self.position[0] += 1
        return conv(x, before)  # type: ignore[no-any-return]  # diffusers is untyped


class Wan:
    """A streamed network. The head ends with the attention over whole frames; the tail is local in space."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.decoder = vae, vae.decoder
        self.patch: int = getattr(vae.config, "patch_size", None) or 1
        self.channels: int = self.decoder.conv_out.out_channels // self.patch**2
        self.knows_first = "first_chunk" in signature(self.decoder.up_blocks[0].forward).parameters
        blocks = [Part(block, (block,)) for block in self.decoder.up_blocks]
        self.parts = (*blocks, Part(self.decoder.conv_out, (self.decoder.conv_out,), self.patch))

    def values_per_pixel(self, latent_frames: int) -> float:
        """Return the measured values. The first latent frame decodes to one frame, every other one to four."""
        width: int = self.decoder.conv_out.in_channels
        has_shortcuts = hasattr(self.decoder.up_blocks[0], "avg_shortcut")
        first, others = (23, 85) if has_shortcuts else (19, 52)
        return width / self.patch**2 * (others if latent_frames > 1 else first)

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Run the decoder up to its attention, frame by frame."""
        cache = Cache()
        for frame in self.vae.post_quant_conv(latents).split(1, 2):  # [1, C, 1, h, w]
            cache.rewind()
            x = cache.convolve(self.decoder.conv_in, frame)  # [1, C', 1, h, w]
            yield self.decoder.mid_block(x, **cache.arguments())

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Run the up blocks and the last convolution, frame by frame, and clamp to [-1, 1] as diffusers does."""
        cache = Cache()
        for number, x in enumerate(chunks):  # [1, C, 1, h, w]
            cache.rewind()
            first = {"first_chunk": number == 0} if self.knows_first else {}
            x = cut(x, cuts[0])
            for part, rows in zip(self.parts[:-1], cuts[1:-1], strict=True):
                x = cut(part.run(x, **cache.arguments(), **first), rows)
            x = self.decoder.norm_out(x)
            x = cache.convolve(self.decoder.conv_out, self.decoder.nonlinearity(x))  # [1, 3 p p, n, H, W]
            yield cut(unpatchify(x, self.patch).clamp(-1, 1), cuts[-1])
