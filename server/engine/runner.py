"""One device's batches, decoded one after another on one thread and rendered on others, so that neither waits."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from server.config import Settings
from server.engine.sync import SyncEngine
from server.engine.tensors import to_host
from server.errors import ServerError
from server.outputs import format_named
from server.types import Computed, Done, RawTensor, Rendered, VAERequest

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Told how a batch goes, from any thread. `decoded` is told once, whatever happens; then the device is free."""

    def is_wanted(self, index: int) -> bool: ...
    def started(self) -> None: ...
    def decoded(self) -> None: ...
    def done(self, index: int, done: Done) -> None: ...
    def failed(self, index: int, error: Exception) -> None: ...


class Runner:
    """Owns the threads. Loading happens beside decoding."""

    def __init__(self, settings: Settings) -> None:
        self.sync = SyncEngine(settings)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._renders = ThreadPoolExecutor(settings.options.render_threads, thread_name_prefix="render")

    def submit(self, requests: Sequence[VAERequest], listener: Listener) -> None:
        """All of one model and one key. Returns at once."""
        job = requests[0].job
        if self.sync.holds(job.model, job.operation):
            self._device.submit(self._run, requests, listener)
            return

        def load_first() -> None:
            try:
                self.sync.load(job.model, job.operation)
            except Exception as error:  # noqa: BLE001  # the border of a load: every waiter is answered
                for index in range(len(requests)):
                    listener.failed(index, error)
                listener.decoded()
            else:
                self._device.submit(self._run, requests, listener)

        # A thread that ends with the load. Each thread that ever ran torch keeps its OpenMP workers, and once there are
        # more of those than cores, libgomp stops waiting actively: a 512² demo decode then takes 330 ms, not 220.
        threading.Thread(target=load_first, name="load", daemon=True).start()

    def close(self) -> None:
        for pool in (self._device, self._renders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, requests: Sequence[VAERequest], listener: Listener) -> None:
        wanted = [index for index in range(len(requests)) if listener.is_wanted(index)]
        if not wanted:
            listener.decoded()
            return
        listener.started()
        film = self._film(requests[wanted[0]]) if len(wanted) == 1 else None
        try:
            jobs = [requests[index].job for index in wanted]
            outcomes: Sequence[Computed | Exception] = self.sync.run(jobs, film)
        except Exception as error:  # the border of a batch: every waiter is answered
            if not isinstance(error, ServerError):
                log.exception("a batch failed")
            outcomes = [error] * len(wanted)
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
                self._renders.submit(self._render, requests[index], outcome, index, listener, film.rendered)
            else:
                self._renders.submit(self._render, requests[index], outcome, index, listener, None)

    def _film(self, request: VAERequest) -> Film | None:
        return Film(self._renders, request) if format_named(request.format).render_frames else None

    def _render(
        self,
        request: VAERequest,
        decoded: Computed,
        index: int,
        listener: Listener,
        begun: Future[Rendered] | None,
    ) -> None:
        started = time.perf_counter()
        try:
            chosen = format_named(request.format)
            rendered = begun.result() if begun else chosen.render(decoded.tensor, request.render)
        except Exception as error:  # the border of a render: its waiter is answered
            if not isinstance(error, ServerError):
                log.exception("a render failed")
            listener.failed(index, error)
            return
        render_ms = (time.perf_counter() - started) * 1e3
        facts = decoded.device_ms, render_ms, decoded.batch_size, decoded.oom_steps, decoded.is_upcast
        listener.done(index, Done(rendered, *facts))


class Abandoned(Exception):
    """No more frames will come."""


class Film:
    """A clip that is rendered while it is decoded."""

    def __init__(self, renders: ThreadPoolExecutor, request: VAERequest) -> None:
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
            if isinstance(chunk, Abandoned):
                raise chunk
            yield chunk
