"""A video that is rendered while it is decoded."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..outputs import format_named
from ..values import Job, RawTensor, Rendered
from .coders.interface import Stopped
from .tensors import to_host


class Abandoned(Exception):
    """No more frames will come."""


class VideoRender:
    """Takes the frames of one video as they are decoded, and renders them on a thread.

    rendered: the finished video, or the error of the render. is_abandoned: `abandon` was called.
    """

    def __init__(self, renders: ThreadPoolExecutor, job: Job, is_wanted: Callable[[], bool]) -> None:
        """Start rendering on a thread of `renders`.

        job: its format must have `render_frames`. is_wanted: returns whether the client still waits for the video.
        """
        self._is_wanted = is_wanted
        self._chunks: queue.SimpleQueue[RawTensor | Abandoned | None] = queue.SimpleQueue()
        self.is_abandoned = False
        render_frames = format_named(job.format).render_frames
        assert render_frames is not None
        self.rendered: Future[Rendered] = renders.submit(render_frames, self._frames(), job.render)

    def write(self, frames: torch.Tensor) -> None:
        """Take the next frames, uint8 `[n, H, W, C]`."""
        self._chunks.put(to_host(frames))

    def close(self) -> None:
        """Note that the video is complete."""
        self._chunks.put(None)

    def abandon(self) -> None:
        """Stop the render: no further frames will come."""
        self.is_abandoned = True
        self._chunks.put(Abandoned())

    def _frames(self) -> Iterator[RawTensor]:
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, Abandoned) or self.is_abandoned:
                raise Abandoned
            if not self._is_wanted():
                raise Stopped
            yield chunk
