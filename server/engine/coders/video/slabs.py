"""Slabs: some rows of a frame, decoded separately and exactly.

A slab is computed with a halo of as many rows around it as the following layers read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..image.bands import Span

UPSAMPLERS: dict[str, Callable[[Any], int]] = {
    "WanResample": lambda _: 2,
    "QwenImageResample": lambda _: 2,
    "QwenImage21Resample": lambda _: 2,
    "HunyuanVideo15Upsample": lambda _: 2,
    "LTXVideoUpsampler3d": lambda upsampler: int(upsampler.stride[1]),
    "LTX2VideoUpsampler3d": lambda upsampler: int(upsampler.stride[1]),
}
"""For each class of upsampling module, how many rows it makes of one. Each has a 3x3 convolution before or after it."""


@dataclass(frozen=True)
class Part:
    """A piece of a decoder that is local in space.

    run: computes it.
    modules: the modules that `run` applies, in order.
    patch: how many rows of pixels `run` makes of each row of the last module's output.
    """

    run: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]
    patch: int = 1

    @property
    def scale(self) -> int:
        """How many rows of output one row of input becomes."""
        scale = self.patch
        for module in self.modules:
            for child in module.modules():
                scale *= rows_of_one(child) or 1
        return scale

    def reach(self, after: int) -> int:
        """Return how many rows of input are needed around a slab to compute `after` rows of output around it."""
        reach = -(-after // self.patch)
        for module in reversed(self.modules):
            reach = reach_of(module, reach)
        return reach


def reach_of(module: nn.Module, after: int) -> int:
    """Return how many rows of input around a slab a module needs to compute `after` rows of output around it.

    The module must run its children in order. A shortcut beside them may only have 1x1 convolutions.
    """
    if rows := rows_of_one(module):
        return -(-after // rows) + 1
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return after + int(module.kernel_size[-2]) // 2
    for child in reversed(list(module.children())):
        after = reach_of(child, after)
    return after


def rows_of_one(module: nn.Module) -> int | None:
    """Return how many rows an upsampling module makes of one; None if the module does not upsample.

    Classes are compared by name, because older versions of diffusers lack some of them.
    """
    rows = UPSAMPLERS.get(type(module).__name__)
    return rows(module) if rows else None


def cuts(parts: Sequence[Part], height: int, slab: Span) -> list[slice]:
    """Return which rows to keep so that exactly the slab remains at the end.

    height: the number of rows of the input. slab: a span of these rows. The first slice applies to the input, each
        following one to the output of the next part.
    """
    margins = [0]
    for part in reversed(parts):
        margins.insert(0, part.reach(margins[0]))
    kept, scale = [], 1
    for margin, times in zip(margins, [*(part.scale for part in parts), 1], strict=True):
        kept.append((max(0, slab[0] * scale - margin), min(height * scale, slab[1] * scale + margin)))
        scale *= times
    starts = [0, *(start * part.scale for (start, _), part in zip(kept[:-1], parts, strict=True))]
    return [slice(top - start, bottom - start) for (top, bottom), start in zip(kept, starts, strict=True)]


def split(height: int, rows: int) -> Iterator[Span]:
    """Split [0, height) into spans of at most `rows` rows, as equal as possible."""
    count = -(-height // rows)
    return pairwise(height * slab // count for slab in range(count + 1))


def cut(x: Tensor, rows: slice) -> Tensor:  # [B, C, F, H, W]
    """Return some rows of x, as a view."""
    return x[..., rows, :]


def unpatchify(x: Tensor, patch: int) -> Tensor:  # [B, C p p, F, H, W] -> [B, C, F, p H, p W]
    """Turn patches of p x p pixels, stored as channels, into pixels."""
    x = x.view(len(x), -1, patch, patch, *x.shape[2:])  # [B, C, p across, p down, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
