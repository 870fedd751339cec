"""Rows of a picture by themselves, exactly: with as many more around them as the layers to come look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

Rows = tuple[int, int]  # from, to

UPSAMPLERS: dict[str, Callable[[Any], int]] = {
    "WanResample": lambda _: 2,
    "QwenImageResample": lambda _: 2,
    "QwenImage21Resample": lambda _: 2,
    "HunyuanVideo15Upsample": lambda _: 2,
    "LTXVideoUpsampler3d": lambda upsampler: int(upsampler.stride[1]),
    "LTX2VideoUpsampler3d": lambda upsampler: int(upsampler.stride[1]),
}
"""Modules that make more rows of one, with a 3x3 convolution before or after: how many."""


@dataclass(frozen=True)
class Part:
    """A piece of a decoder that is local in space: `scale` rows for each row, which see `reach` rows around it."""

    run: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]
    patch: int = 1
    """Rows of pixels in each row that the last module gives."""

    @property
    def scale(self) -> int:
        scale = self.patch
        for module in self.modules:
            for child in module.modules():
                scale *= rows_of_one(child) or 1
        return scale

    def reach(self, after: int) -> int:
        """How many rows around its own the input needs for `after` rows around the output."""
        reach = -(-after // self.patch)
        for module in reversed(self.modules):
            reach = reach_of(module, reach)
        return reach


def reach_of(module: nn.Module, after: int) -> int:
    """Of modules that run their children in order, a shortcut beside them of 1x1 convolutions at most."""
    if rows := rows_of_one(module):
        return -(-after // rows) + 1
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return after + int(module.kernel_size[-2]) // 2
    for child in reversed(list(module.children())):
        after = reach_of(child, after)
    return after


def rows_of_one(module: nn.Module) -> int | None:
    """None of modules that do not upsample. By name, for not every diffusers has all of them."""
    rows = UPSAMPLERS.get(type(module).__name__)
    return rows(module) if rows else None


def cuts(parts: Sequence[Part], height: int, slab: Rows) -> list[slice]:
    """The rows to keep of the input, and then of each part's output, so that the slab's remain in the end."""
    margins = [0]
    for part in reversed(parts):
        margins.insert(0, part.reach(margins[0]))
    kept, scale = [], 1
    for margin, times in zip(margins, [*(part.scale for part in parts), 1], strict=True):
        kept.append((max(0, slab[0] * scale - margin), min(height * scale, slab[1] * scale + margin)))
        scale *= times
    starts = [0, *(start * part.scale for (start, _), part in zip(kept[:-1], parts, strict=True))]
    return [slice(top - start, bottom - start) for (top, bottom), start in zip(kept, starts, strict=True)]


def split(height: int, rows: int) -> Iterator[Rows]:
    """As even as can be, none of more than `rows`."""
    count = -(-height // rows)
    return pairwise(height * slab // count for slab in range(count + 1))


def cut(x: Tensor, rows: slice) -> Tensor:  # [B, C, F, H, W]
    return x[..., rows, :]


def unpatchify(x: Tensor, patch: int) -> Tensor:  # [B, C p p, F, H, W] -> [B, C, F, p H, p W]
    x = x.view(len(x), -1, patch, patch, *x.shape[2:])  # [B, C, p across, p down, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
