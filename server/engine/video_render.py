"""A video that is rendered while it is decoded."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..outputs import Format, format_named
from ..values import Job, RawTensor, Rendered
from .coders.interface import Stopped
from .tensors import to_host


class Abandoned(Exception):
    """No more frames will come."""


class VideoRender:
    """Takes the frames of one video as they are decoded, and renders them on a thread.

    If the decode has to begin again, the frames that were taken before are left out: they are the same, except for the
    rounding.

    rendered: the finished video, or the error of the render. A format that is streamed leaves an empty body here,
        because its pieces were sent before.
    """

    def __init__(
        self,
        renders: ThreadPoolExecutor,
        job: Job,
        is_wanted: Callable[[], bool],
        progressed: Callable[[int], None],
        emitted: Callable[[bytes], None],
    ) -> None:
        """Start rendering on a thread of `renders`.

        job: its format must have `render_frames`. is_wanted: returns whether the client still waits for the video.
        progressed: is told how many frames are done. emitted: receives the pieces of a streamed format.
        """
        self._is_wanted = is_wanted
        self._progressed, self._emitted = progressed, emitted
        self._chunks: queue.SimpleQueue[RawTensor | Abandoned | None] = queue.SimpleQueue()
        self._decoded = 0  # the frames of this attempt
        self._taken = 0  # the frames that are rendered, of all attempts
        self._is_abandoned = False
        self.rendered: Future[Rendered] = renders.submit(self._render, format_named(job.format), job)

    def write(self, frames: torch.Tensor) -> None:
        """Take the next frames, uint8 `[n, H, W, C]`."""
        new = frames[max(0, self._taken - self._decoded) :]  # [m, H, W, C]
        self._decoded += len(frames)
        self._progressed(self._decoded)
        if len(new):
            self._taken += len(new)
            self._chunks.put(to_host(new))

    def rewind(self) -> None:
        """Note that the decode begins again with the first frame."""
        self._decoded = 0

    def close(self) -> None:
        """Note that the video is complete."""
        self._chunks.put(None)

    def abandon(self) -> None:
        """Stop the render: no further frames will come."""
        self._is_abandoned = True
        self._chunks.put(Abandoned())

    def _render(self, chosen: Format, job: Job) -> Rendered:
        if chosen.stream_frames is None:
            assert chosen.render_frames is not None
            return chosen.render_frames(self._frames(), job.render)
        for piece in chosen.stream_frames(self._frames(), job.render):
            self._emitted(piece)
        return Rendered(memoryview(b""), job.render.media_type)

    def _frames(self) -> Iterator[RawTensor]:
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, Abandoned) or self._is_abandoned:
                raise Abandoned
            if not self._is_wanted():
                raise Stopped
            yield chunk
