"""Compute the batches of one device on one thread and render answers on other threads, so that neither waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ..config import Settings
from ..cores import usual_render_threads
from ..errors import ServerError, TooLargeForDevice
from ..model_info import CoderId
from ..outputs import format_named
from ..own_thread import in_own_thread
from ..values import RawTensor, Rendered, RenderedResult, Request, TensorResult
from .coders.interface import Stopped
from .models import LoadedModels, NotLoaded
from .video_render import VideoRender

log = logging.getLogger(__name__)

# How many frames of a whole video are rendered before the runner checks again whether the client has left.
FRAMES_AT_ONCE = 16


class Listener(Protocol):
    """Is told what happens to a batch, from any thread.

    `computed` is called exactly once, after which the batch does not use the device. For each request, either
    `finished` or `failed` is called exactly once, also if the request is no longer wanted.
    """

    def is_wanted(self, index: int) -> bool:
        """Return whether the client of a request still waits for its answer."""
        ...

    def started(self) -> None:
        """Note that the device has begun."""
        ...

    def progressed(self, index: int, frames: int) -> None:
        """Note how many frames of a video are done."""
        ...

    def emitted(self, index: int, piece: bytes) -> None:
        """Take the next piece of the answer to a request whose format is streamed."""
        ...

    def computed(self) -> None:
        """Note that the batch no longer uses the device. Its answers may still be rendered."""
        ...

    def finished(self, index: int, result: RenderedResult) -> None:
        """Take the answer to a request."""
        ...

    def failed(self, index: int, error: Exception) -> None:
        """Take the error of a request."""
        ...


@dataclass(eq=False)
class Work:
    """A batch that was submitted.

    is_taken: a thread runs it or has run it. video: renders the frames of its only request, if that is a video.
    """

    requests: Sequence[Request]
    listener: Listener
    is_taken: bool = False
    video: VideoRender | None = None

    @property
    def coder(self) -> CoderId:
        """The direction of the model that runs it."""
        return self.requests[0].job.coder

    @property
    def wanted(self) -> list[int]:
        """The requests that a client still waits for, by index."""
        return [index for index in range(len(self.requests)) if self.listener.is_wanted(index)]

    def check(self) -> None:
        """Raise Stopped once the clients of all its requests have left."""
        if not any(self.listener.is_wanted(index) for index in range(len(self.requests))):
            raise Stopped

    def abandon(self) -> None:
        """End the render of its video, if there is one, which would wait for further frames."""
        if self.video:
            self.video.abandon()

    def fail(self, error: Exception) -> None:
        """Answer every wanted request with this error, and note that the batch no longer uses the device."""
        self.abandon()
        for index in self.wanted:
            self.listener.failed(index, error)
        self.listener.computed()


class Runner:
    """Owns the threads of a device: one computes, the others render.

    steps: how many steps of work have begun on the device, which distinguishes slow work from work that hangs.
    """

    def __init__(self, settings: Settings, models: LoadedModels) -> None:
        self.steps = 0
        self._models = models
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        renders = settings.options.render_threads or usual_render_threads()
        self._renders = ThreadPoolExecutor(renders, thread_name_prefix="render")
        # Threads of their own, because they are busy as long as the decode, and other answers must not wait for them.
        self._video_renders = ThreadPoolExecutor(renders, thread_name_prefix="video")
        self._taking = threading.Lock()
        self._short: deque[Work] = deque()  # may run between the steps of longer work
        self._on_device: list[CoderId] = []  # what runs, and what runs between its steps

    def submit(self, requests: Sequence[Request], listener: Listener, *, is_short: bool = False) -> None:
        """Run the requests of one batch, and return at once.

        is_short: the batch may run between the steps of work that is already on the device.
        """
        work = Work(requests, listener)
        if self._models.holds(work.coder):
            self._submit(work, is_short)
            return

        def load_first() -> None:  # the model was unloaded after the batch was formed
            try:
                self._models.load(*work.coder)
            except Exception as error:  # noqa: BLE001  # the border of a load: every waiter is answered
                work.fail(error)
            else:
                self._submit(work, is_short)

        in_own_thread("load", load_first)

    def close(self) -> None:
        """End the threads. Work in progress is not waited for."""
        for pool in (self._device, self._renders, self._video_renders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Work, is_short: bool) -> None:
        if is_short:
            with self._taking:
                self._short.append(work)
        self._device.submit(self._run_unless_taken, work)

    def _run_unless_taken(self, work: Work) -> None:
        with self._taking:
            if work.is_taken:
                return
            self._take(work)
        self._run_or_fail(work)

    def _run_or_fail(self, work: Work) -> None:
        try:
            self._run(work)
        except Exception as error:  # the border of a batch: every waiter is answered, and no other batch fails with it
            log.exception("a batch failed outside of its computation")
            work.fail(error)

    def _take(self, work: Work) -> None:
        work.is_taken = True
        if work in self._short:
            self._short.remove(work)

    def _run_short_work(self) -> None:
        """Run one short batch between two steps of another one, unless this is already such a run."""
        if not self._short or len(self._on_device) > 1:
            return
        with self._taking:
            fitting = (work for work in self._short if self._may_interleave(work.coder))
            work = next(fitting, None)
            if work is None:
                return
            self._take(work)
        self._run_or_fail(work)

    def _may_interleave(self, coder: CoderId) -> bool:
        """Return whether a coder can run between the steps of the current work.

        diffusers' own coders keep state between their steps, so that none of them can run inside itself.
        """
        info = self._models.loaded(coder.model)
        if info is None or not info.runs(coder.direction):
            return False
        return coder not in self._on_device or info.may_run_inside_itself(coder.direction)

    def _run(self, work: Work) -> None:
        requests, listener, wanted = work.requests, work.listener, work.wanted
        for index in set(range(len(requests))).difference(wanted):
            listener.failed(index, Stopped())
        if not wanted:
            work.abandon()
            listener.computed()
            return
        listener.started()
        if len(wanted) == 1 and work.video is None:
            work.video = self._video_render(requests[wanted[0]], listener, wanted[0])
        video = work.video if len(wanted) == 1 else None
        outcomes = self._compute(work, wanted, video)
        if self._on_device and any(isinstance(outcome, NotLoaded | TooLargeForDevice) for outcome in outcomes):
            # The work beside it holds the memory, or its model was unloaded just now. Try again with the whole device.
            if video:
                video.rewind()
            self._device.submit(self._run_or_fail, work)
            return
        if video and isinstance(outcomes[0], Exception):
            video.abandon()
        listener.computed()
        for index, outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, Exception):
                if not isinstance(outcome, ServerError):
                    log.error("a request failed", exc_info=outcome)
                listener.failed(index, outcome)
            elif video:
                video.close()
                video.rendered.add_done_callback(partial(_deliver, outcome, index, listener, time.perf_counter()))
            else:
                self._renders.submit(_render, requests[index], outcome, index, listener)

    def _compute(
        self, work: Work, wanted: Sequence[int], video: VideoRender | None
    ) -> Sequence[TensorResult | Exception]:
        def between_steps() -> None:
            self.steps += 1
            work.check()
            self._run_short_work()

        self._on_device.append(work.coder)
        try:
            return self._models.run([work.requests[index] for index in wanted], video, between_steps)
        except Exception as error:  # the border of a batch: every waiter is answered
            if not isinstance(error, ServerError):
                log.exception("a batch failed")
            return [error] * len(wanted)
        finally:
            self._on_device.pop()

    def _video_render(self, request: Request, listener: Listener, index: int) -> VideoRender | None:
        """Return the render that takes frames while they are decoded, for a format that has one."""
        if format_named(request.job.format).render_frames is None:
            return None
        return VideoRender(
            self._video_renders,
            request.job,
            partial(listener.is_wanted, index),
            partial(listener.progressed, index),
            partial(listener.emitted, index),
        )


def _render(request: Request, result: TensorResult, index: int, listener: Listener) -> None:
    rendered: Future[Rendered] = Future()
    started = time.perf_counter()
    try:
        rendered.set_result(_rendered(request, result.body, index, listener))
    except Exception as error:  # noqa: BLE001  # the border of a render: its waiter is answered
        rendered.set_exception(error)
    _deliver(result, index, listener, started, rendered)


def _deliver(result: TensorResult, index: int, listener: Listener, started: float, rendered: Future[Rendered]) -> None:
    """Answer with what was rendered, or with the error. started: when only the rendering was left to do."""
    error = rendered.exception()
    if error is None:
        listener.finished(index, result.rendered(rendered.result(), (time.perf_counter() - started) * 1e3))
        return
    if not isinstance(error, ServerError):
        log.error("a render failed", exc_info=error)
    listener.failed(index, error if isinstance(error, Exception) else ServerError())


def _rendered(request: Request, tensor: RawTensor, index: int, listener: Listener) -> Rendered:
    """Render a whole tensor. Raises Stopped soon after the client has left."""
    if not listener.is_wanted(index):
        raise Stopped
    chosen = format_named(request.job.format)
    if chosen.render_frames is None:
        return chosen.render(tensor, request.job.render)

    def chunks() -> Iterator[RawTensor]:
        frame_bytes = tensor.data.nbytes // tensor.shape[0]
        for first in range(0, tensor.shape[0], FRAMES_AT_ONCE):
            if not listener.is_wanted(index):
                raise Stopped
            count = min(FRAMES_AT_ONCE, tensor.shape[0] - first)
            data = tensor.data[first * frame_bytes : (first + count) * frame_bytes]
            yield RawTensor((count, *tensor.shape[1:]), tensor.dtype, data)

    return chosen.render_frames(chunks(), request.job.render)
