"""Modules of diffusers that look at the frames around theirs, before and after, given a clip chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """How many frames before and after its own a module's output needs, and how many it makes of one.

    The clip's first frame gives one alone. At the ends of what it is given a module sees copies of the last frame.
    """

    before: int
    after: int
    times: int = 1


def slide(run: Callable[[Tensor], Tensor], span: Span, chunks: Iterable[Tensor], rows: slice) -> Iterator[Tensor]:
    """The rows of what `run` makes of the whole clip, in chunks; what the ends of a window spoil is cut off."""
    for window, known, count in windows(chunks, span):  # [B, C, known + count + ..., H, W]
        first = span.times * known - (span.times - 1) if known else 0
        last = span.times * (known + count - 1) + 1
        yield run(window)[:, :, first:last, rows]


def windows(chunks: Iterable[Tensor], span: Span) -> Iterator[tuple[Tensor, int, int]]:
    """Frames, how many of the first of them are there only to be looked at, and how many come then."""
    frames, known = None, 0
    for chunk in chunks:  # [B, C, n, H, W]
        frames = chunk if frames is None else torch.cat([frames, chunk], 2)
        count = frames.shape[2] - known - span.after
        if count > 0:
            yield frames, known, count
            kept = min(span.before, known + count)
            frames, known = frames[:, :, known + count - kept :], kept
    if frames is not None and frames.shape[2] > known:
        yield frames, known, frames.shape[2] - known
