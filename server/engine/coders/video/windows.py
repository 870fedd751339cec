"""Modules of diffusers that look at the frames around theirs, before and after, given a clip chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Frames that a module makes at a time: a residual block's four around them are an eighth to a quarter more work.
MOST, LEAST = 32, 16


@dataclass(frozen=True)
class Span:
    """How many frames before and after its own a module's output needs, and how many it makes of one.

    The clip's first frame gives one alone. Past the ends of what it is given a module sees its last frame again.
    """

    before: int
    after: int
    times: int = 1

    def made_of(self, first: int, count: int) -> slice:
        """Where in the output is what comes of the frames from `first` on."""
        return slice(max(0, self.times * (first - 1) + 1), self.times * (first + count - 1) + 1)


class Window:
    """Frames that wait for those after them, behind those that they look back to."""

    def __init__(self, run: Callable[[Tensor], Tensor], span: Span, rows: slice) -> None:
        self.run, self.span, self.rows = run, span, rows
        self.frames: Tensor | None = None  # [B, C, n, H, W]
        self.known = 0  # of the frames, those that are there only to be looked at

    def push(self, chunk: Tensor) -> None:  # [B, C, n, H, W]
        self.frames = chunk if self.frames is None else torch.cat([self.frames, chunk], 2)

    def ready(self, after: int) -> int:
        """How many frames have so many after them."""
        return 0 if self.frames is None else self.frames.shape[2] - self.known - after

    def slide(self, count: int, after: int) -> Tensor:
        """What comes of so many frames, given so many after them; what the window's ends have spoilt is cut off."""
        assert self.frames is not None
        done = self.known + count
        made = self.run(self.frames[:, :, : done + after])
        made = made[:, :, self.span.made_of(self.known, count), self.rows]
        self.known = min(self.span.before, done)
        self.frames = self.frames[:, :, done - self.known :].clone()
        return made


def slide(run: Callable[[Tensor], Tensor], span: Span, chunks: Iterable[Tensor], rows: slice) -> Iterator[Tensor]:
    """The rows of what `run` makes of the whole clip, in chunks. No variable holds one that others work on."""
    window = Window(run, span, rows)
    for chunk in chunks:  # [B, C, n, H, W]
        window.push(chunk)
        del chunk
        while (ready := window.ready(span.after)) >= LEAST // span.times:
            yield window.slide(min(ready, MOST // span.times), span.after)
    if left := window.ready(0):
        yield window.slide(left, 0)
