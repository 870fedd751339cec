"""One device's batches, decoded one after another on one thread and rendered on others, so that neither waits."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from server.config import Settings
from server.engine.coder import Stopped
from server.engine.sync import NotLoaded, SyncEngine
from server.engine.tensors import to_host
from server.errors import ServerError, TooLargeForDevice
from server.outputs import format_named
from server.types import Computed, Done, Half, RawTensor, Rendered, VAERequest

log = logging.getLogger(__name__)


FRAMES_AT_ONCE = 16  # of a whole video that is rendered: between two of them the render may be stopped


class Listener(Protocol):
    """Told how a batch goes, from any thread. `decoded` is told once, whatever happens; then the device is free.

    Each request gets `done` or `failed` once, also one that is no longer wanted.
    """

    def is_wanted(self, index: int) -> bool: ...
    def started(self) -> None: ...
    def decoded(self) -> None: ...
    def done(self, index: int, done: Done) -> None: ...
    def failed(self, index: int, error: Exception) -> None: ...


@dataclass(eq=False)
class Work:
    """A batch that was submitted. is_taken: whether a thread runs it, or did."""

    requests: Sequence[VAERequest]
    listener: Listener
    is_taken: bool = False

    @property
    def half(self) -> Half:
        job = self.requests[0].job
        return Half(job.model, job.operation)

    @property
    def wanted(self) -> list[int]:
        return [index for index in range(len(self.requests)) if self.listener.is_wanted(index)]

    def check(self) -> None:
        """Raise Stopped once the clients of all its requests have left."""
        if not any(self.listener.is_wanted(index) for index in range(len(self.requests))):
            raise Stopped


class Runner:
    """Owns the threads: one computes, others render and load.

    steps: how many steps of work have begun on the device, so that others can tell slow work from work that hangs.
    """

    def __init__(self, settings: Settings) -> None:
        self.sync = SyncEngine(settings)
        self.steps = 0
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._renders = ThreadPoolExecutor(settings.options.render_threads, thread_name_prefix="render")
        # Of their own: they take as long as their decode, and other answers must not wait for them.
        self._films = ThreadPoolExecutor(2, thread_name_prefix="film")
        self._taking = threading.Lock()
        self._short: deque[Work] = deque()  # may run between the steps of longer work
        self._on_device: list[Half] = []  # what runs, and what runs between its steps

    def submit(self, requests: Sequence[VAERequest], listener: Listener, *, is_short: bool = False) -> None:
        """Run requests of one model and one key; returns at once.

        is_short: they may run between the steps of work that is on the device already.
        """
        work = Work(requests, listener)
        if self.sync.holds(*work.half):
            self._submit(work, is_short)
            return

        def load_first() -> None:
            try:
                self.sync.load(*work.half)
            except Exception as error:  # noqa: BLE001  # the border of a load: every waiter is answered
                for index in range(len(requests)):
                    listener.failed(index, error)
                listener.decoded()
            else:
                self._submit(work, is_short)

        # A thread that ends with the load. Each thread that ever ran torch keeps its OpenMP workers, and once there are
        # more of those than cores, libgomp stops waiting actively: a 512² demo decode then takes 330 ms, not 220.
        threading.Thread(target=load_first, name="load", daemon=True).start()

    def close(self) -> None:
        for pool in (self._device, self._renders, self._films):
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
        self._run(work)

    def _take(self, work: Work) -> None:
        work.is_taken = True
        if work in self._short:
            self._short.remove(work)

    def _run_short_work(self) -> None:
        """Run one short batch now, between two steps of another one, unless one is being run so."""
        if not self._short or len(self._on_device) > 1:
            return
        with self._taking:
            fitting = (work for work in self._short if self._may_interleave(work.half))
            work = next(fitting, None)
            if work is None:
                return
            self._take(work)
        try:
            self._run(work)
        except Exception as error:  # the border of a batch: what runs beside it must not pay for it
            log.exception("a batch failed between the steps of another one")
            for index in work.wanted:
                work.listener.failed(index, error)
            work.listener.decoded()

    def _may_interleave(self, half: Half) -> bool:
        """diffusers' own coders keep state between their steps: the same one cannot run twice at a time."""
        info = self.sync.loaded(half.model)
        if info is None or not info.runs(half.operation):
            return False
        return half not in self._on_device or info.may_run_inside_itself(half.operation)

    def _run(self, work: Work) -> None:
        requests, listener, wanted = work.requests, work.listener, work.wanted
        for index in set(range(len(requests))).difference(wanted):
            listener.failed(index, Stopped())
        if not wanted:
            listener.decoded()
            return
        listener.started()
        film = self._film(requests[wanted[0]], listener, wanted[0]) if len(wanted) == 1 else None
        outcomes = self._compute(work, wanted, film)
        if self._on_device and any(isinstance(outcome, NotLoaded | TooLargeForDevice) for outcome in outcomes):
            # What runs beside it holds the memory, or its model has just been unloaded: it gets the device to itself.
            if film:
                film.abandon()
            self._device.submit(self._run, work)
            return
        if film and isinstance(outcomes[0], Exception):
            film.abandon()
        listener.decoded()
        for index, outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, Exception):
                if not isinstance(outcome, ServerError):
                    log.error("a job failed", exc_info=outcome)
                listener.failed(index, outcome)
            elif film and not film.is_abandoned:
                film.finish()
                film.rendered.add_done_callback(partial(self._deliver, outcome, index, listener, time.perf_counter()))
            else:
                self._renders.submit(self._render, requests[index], outcome, index, listener)

    def _compute(self, work: Work, wanted: Sequence[int], film: Film | None) -> Sequence[Computed | Exception]:
        def between_steps() -> None:
            self.steps += 1
            work.check()
            self._run_short_work()

        self._on_device.append(work.half)
        try:
            return self.sync.run([work.requests[index].job for index in wanted], film, between_steps)
        except Exception as error:  # the border of a batch: every waiter is answered
            if not isinstance(error, ServerError):
                log.exception("a batch failed")
            return [error] * len(wanted)
        finally:
            self._on_device.pop()

    def _film(self, request: VAERequest, listener: Listener, index: int) -> Film | None:
        return (
            Film(self._films, request, partial(listener.is_wanted, index))
            if format_named(request.format).render_frames
            else None
        )

    def _render(self, request: VAERequest, decoded: Computed, index: int, listener: Listener) -> None:
        rendered: Future[Rendered] = Future()
        started = time.perf_counter()
        try:
            rendered.set_result(_rendered(request, decoded.tensor, index, listener))
        except Exception as error:  # noqa: BLE001  # the border of a render: its waiter is answered
            rendered.set_exception(error)
        self._deliver(decoded, index, listener, started, rendered)

    def _deliver(
        self, decoded: Computed, index: int, listener: Listener, started: float, rendered: Future[Rendered]
    ) -> None:
        """Answer with what was rendered, or with why it was not. started: when only rendering was left to do."""
        error = rendered.exception()
        if error is None:
            render_ms = (time.perf_counter() - started) * 1e3
            facts = decoded.device_ms, render_ms, decoded.batch_size, decoded.oom_steps, decoded.is_upcast
            listener.done(index, Done(rendered.result(), *facts))
            return
        if not isinstance(error, ServerError):
            log.error("a render failed", exc_info=error)
        listener.failed(index, error if isinstance(error, Exception) else ServerError())


def _rendered(request: VAERequest, tensor: RawTensor, index: int, listener: Listener) -> Rendered:
    """Render a whole tensor. Raises Stopped as soon as it is noticed that the client left."""
    if not listener.is_wanted(index):
        raise Stopped
    chosen = format_named(request.format)
    if chosen.render_frames is None:
        return chosen.render(tensor, request.render)

    def chunks() -> Iterator[RawTensor]:
        frame_bytes = tensor.data.nbytes // tensor.shape[0]
        for first in range(0, tensor.shape[0], FRAMES_AT_ONCE):
            if not listener.is_wanted(index):
                raise Stopped
            count = min(FRAMES_AT_ONCE, tensor.shape[0] - first)
            data = tensor.data[first * frame_bytes : (first + count) * frame_bytes]
            yield RawTensor((count, *tensor.shape[1:]), tensor.dtype, data)

    return chosen.render_frames(chunks(), request.render)


class Abandoned(Exception):
    """No more frames will come."""


class Film:
    """A video that is rendered while it is decoded: frames go in one by one, and the answer comes out."""

    def __init__(self, renders: ThreadPoolExecutor, request: VAERequest, is_wanted: Callable[[], bool]) -> None:
        self._is_wanted = is_wanted
        self._chunks: queue.SimpleQueue[RawTensor | Abandoned | None] = queue.SimpleQueue()
        self.is_abandoned = False
        render_frames = format_named(request.format).render_frames
        assert render_frames is not None
        self.rendered: Future[Rendered] = renders.submit(render_frames, self._frames(), request.render)

    def write(self, frames: torch.Tensor) -> None:
        self._chunks.put(to_host(frames))

    def finish(self) -> None:
        self._chunks.put(None)

    def abandon(self) -> None:
        self.is_abandoned = True
        self._chunks.put(Abandoned())

    def _frames(self) -> Iterator[RawTensor]:
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, Abandoned) or self.is_abandoned:
                raise Abandoned
            if not self._is_wanted():
                raise Stopped
            yield chunk
