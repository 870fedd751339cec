"""Run modules that read frames before and after each frame on a video that comes in chunks, with a sliding window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# How many frames a module makes at a time. The four frames that a residual block reads around them add an eighth to a
# quarter to the work.
MOST, LEAST = 32, 16


@dataclass(frozen=True)
class FrameReach:
    """Which frames a module reads to make one frame.

    before, after: how many frames before and after it.
    times: how many frames it makes of one. The first frame of the video always becomes a single frame.

    At both ends of its input, a module repeats the first or last frame, which makes the frames there wrong unless it is
    an end of the video.
    """

    before: int
    after: int
    times: int = 1

    def made_of(self, first: int, count: int) -> slice:
        """Return which frames of the output the input frames [first, first + count) become."""
        return slice(max(0, self.times * (first - 1) + 1), self.times * (first + count - 1) + 1)


class Window:
    """The input frames that are still needed: those that wait for later frames, and the last ones before them."""

    def __init__(self, run: Callable[[Tensor], Tensor], reach: FrameReach, rows: slice) -> None:
        self.run, self.reach, self.rows = run, reach, rows
        self.frames: Tensor | None = None  # [B, C, n, H, W]
        self.known = 0  # how many of the frames are done, and kept only because later ones read them

    def push(self, chunk: Tensor) -> None:  # [B, C, n, H, W]
        """Add the next frames."""
        self.frames = chunk if self.frames is None else torch.cat([self.frames, chunk], 2)

    def ready(self, after: int) -> int:
        """Return how many waiting frames have at least `after` frames after them."""
        return 0 if self.frames is None else self.frames.shape[2] - self.known - after

    def slide(self, count: int, after: int) -> Tensor:
        """Return the output for the next `count` frames.

        after: how many frames after them the module may read. Output that the ends of the window made wrong is cut off.
        """
        assert self.frames is not None
        done = self.known + count
        made = self.run(self.frames[:, :, : done + after])
        made = made[:, :, self.reach.made_of(self.known, count), self.rows]
        self.known = min(self.reach.before, done)
        self.frames = self.frames[:, :, done - self.known :].clone()
        return made


def slide(
    run: Callable[[Tensor], Tensor], reach: FrameReach, chunks: Iterable[Tensor], rows: slice
) -> Iterator[Tensor]:
    """Yield, in chunks, some rows of what `run` makes of the whole video.

    run: applies the module. reach: which frames it reads. chunks: the video `[B, C, n, H, W]`. rows: which rows of its
    output to keep. No variable here keeps a chunk alive while it is not needed.
    """
    window = Window(run, reach, rows)
    for chunk in chunks:  # [B, C, n, H, W]
        window.push(chunk)
        del chunk
        while (ready := window.ready(reach.after)) >= LEAST // reach.times:
            yield window.slide(min(ready, MOST // reach.times), reach.after)
    if left := window.ready(0):
        yield window.slide(left, 0)
