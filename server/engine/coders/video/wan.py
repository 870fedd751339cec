"""Wan 2.1 and 2.2 and Qwen-Image: a latent frame at a time, as diffusers decodes them, with its own cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .slabs import Part, cut, unpatchify


class Cache:
    """diffusers' list of each convolution's last two frames, and how far in it a pass has come."""

    def __init__(self) -> None:
        self.frames: dict[int, Any] = defaultdict(lambda: None)
        self.position = [0]

    def arguments(self) -> dict[str, Any]:
        return {"feat_cache": self.frames, "feat_idx": self.position}

    def rewind(self) -> None:
        self.position[0] = 0

    def convolve(self, conv: Any, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', n, H, W]
        """What a block does around each of its convolutions."""
        before = self.frames[self.position[0]]
        is_alone = x.shape[2] == 1 and before is not None
        self.frames[self.position[0]] = torch.cat([before[:, :, -1:], x], 2) if is_alone else x[:, :, -2:].clone()
        self.position[0] += 1
        return conv(x, before)  # type: ignore[no-any-return]  # diffusers is untyped


class Wan:
    """The first half ends with the attention over a picture, the second is local in space."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.decoder = vae, vae.decoder
        self.patch: int = getattr(vae.config, "patch_size", None) or 1
        self.channels: int = self.decoder.conv_out.out_channels // self.patch**2
        self.knows_first = "first_chunk" in signature(self.decoder.up_blocks[0].forward).parameters
        blocks = [Part(block, (block,)) for block in self.decoder.up_blocks]
        self.parts = (*blocks, Part(self.decoder.conv_out, (self.decoder.conv_out,), self.patch))

    def values_per_pixel(self, latent_frames: int) -> float:
        """The first frame comes alone, every other as four of them."""
        width: int = self.decoder.conv_out.in_channels
        has_shortcuts = hasattr(self.decoder.up_blocks[0], "avg_shortcut")
        alone, others = (23, 85) if has_shortcuts else (19, 52)
        return width / self.patch**2 * (others if latent_frames > 1 else alone)

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        cache = Cache()
        for frame in self.vae.post_quant_conv(latents).split(1, 2):  # [1, C, 1, h, w]
            cache.rewind()
            x = cache.convolve(self.decoder.conv_in, frame)  # [1, C', 1, h, w]
            yield self.decoder.mid_block(x, **cache.arguments())

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
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
