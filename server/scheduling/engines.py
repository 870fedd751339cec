"""What the scheduler gives to the devices (Pending, Batch), and what it expects of them (Engine, Devices)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..errors import ModelUnavailable
from ..model_info import CoderId, LoadedInfo, ModelInfo
from ..values import RenderedResult, Request
from .fair_queue import Ticket

LONG_S = 1.0  # batches that take longer give way to shorter ones between their steps
SHORT_SHARE = 0.25  # a batch is short beside a long one if it takes at most this share of the long one's time


@dataclass(eq=False, kw_only=True)
class Pending(Ticket):
    """A request from its admission to its answer, and the future that its client waits for.

    started: when a device last began with it; None before.
    deaths: how many workers died while they computed it.
    tries: how many attempts were ended by the death of a worker, on the device or not.
    least_seconds: the least time that it takes on a device; 0 if that is not known.
    on_start: called whenever a device begins with it.
    on_piece: receives the pieces of an answer that is streamed; None if the answer is wanted as a whole.
    emitted_bytes: how many bytes of the answer were passed on as pieces.
    frames_done: how many frames of a video are done.
    """

    coder: CoderId
    request: Request
    answer: asyncio.Future[RenderedResult]
    started: float | None = None
    deaths: int = 0
    tries: int = 0
    least_seconds: float = 0.0
    on_start: Callable[[], None] = lambda: None
    on_piece: Callable[[bytes], None] | None = None
    emitted_bytes: int = 0
    frames_done: int = 0
    _collected: list[bytes] = field(default_factory=list)

    @staticmethod
    def of(
        request: Request, *, seconds: float, deadline: float, least_seconds: float = 0.0, is_alone: bool = False
    ) -> Pending:
        """Return the entry of a request that arrives now. seconds: the time that it usually takes on a device."""
        loop, job = asyncio.get_running_loop(), request.job
        return Pending(
            coder=job.coder,
            key=(job.coder, job.geometry.key, job.layout),
            pixels=job.geometry.pixels,
            seconds=seconds,
            arrived=loop.time(),
            deadline=deadline,
            is_alone=is_alone,
            least_seconds=least_seconds,
            request=request,
            answer=loop.create_future(),
        )

    def note_started(self) -> None:
        """Note that a device has begun with it."""
        self._collected.clear()  # pieces of an attempt that was ended by the death of a worker
        self.started, self.frames_done = asyncio.get_running_loop().time(), 0
        self.on_start()

    def emit(self, piece: bytes) -> None:
        """Pass on the next piece of the answer, or keep it until the others are there. Not if the client has left."""
        if not self.is_wanted:
            return
        if self.on_piece is None:
            self._collected.append(piece)
            return
        self.emitted_bytes += len(piece)
        self.on_piece(piece)

    def finish(self, result: RenderedResult) -> None:
        """Answer the client, unless it has an answer or has left."""
        if self._collected:
            whole = replace(result.body, body=memoryview(b"".join([*self._collected, result.body.body])))
            result = replace(result, body=whole)
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: Exception) -> None:
        """Answer the client with an error, unless it has an answer or has left."""
        if not self.answer.done():
            self.answer.set_exception(error)

    @property
    def is_wanted(self) -> bool:
        """Whether the client still waits."""
        return not self.answer.done()


class Batch:
    """Requests that go to a device together.

    The engine calls `note_started` and `note_computed` on the event loop, when the device begins and when it is free.
    """

    def __init__(self, members: Sequence[Pending], beside: Batch | None = None) -> None:
        """beside: a longer batch; this one may run between its steps."""
        self.members = members
        self.beside = beside
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started_at = 0.0
        self._gave_away_s = 0.0  # to batches that ran between its steps

    @property
    def coder(self) -> CoderId:
        """The direction of the model that runs it."""
        return self.members[0].coder

    @property
    def is_short(self) -> bool:
        """Whether it may run between the steps of another batch."""
        return self.beside is not None

    @property
    def seconds(self) -> float:
        """The time that all of it usually takes on the device."""
        return sum(pending.seconds for pending in self.members)

    @property
    def seconds_done(self) -> float:
        """The time that the device has worked on it."""
        if not self.started.done():
            return 0.0
        return asyncio.get_running_loop().time() - self._started_at - self._gave_away_s

    @property
    def seconds_left(self) -> float:
        """The time that it will probably take from now on."""
        return max(0.0, self.seconds - self.seconds_done)

    @property
    def short_s(self) -> float:
        """The longest work, in seconds, that may run between its steps; 0 if it has not started or is not long."""
        long_s = max(self.seconds, self.seconds_done)
        return SHORT_SHARE * long_s if self.started.done() and long_s > LONG_S else 0.0

    @property
    def used_tag(self) -> float:
        """The virtual time of the queue that this batch has used up so far."""
        return (self.members[0].tag or 0.0) + self.seconds_done

    def note_started(self) -> None:
        """Note that the device has begun."""
        if not self.started.done():
            for pending in self.members:
                pending.note_started()
            self._started_at = asyncio.get_running_loop().time()
            self.started.set_result(None)

    def note_computed(self) -> None:
        """Note that the device is free. Answers may still be rendered."""
        if self.computed.done():
            return
        if self.beside and self.started.done():
            self.beside._gave_away_s += self.seconds_done
        self.computed.set_result(None)


class Devices(Protocol):
    """The devices of a server: the engines of this machine (`Dispatcher`), or the replicas of a cluster."""

    @property
    def is_alive(self) -> bool:
        """Whether there is a device, or will be one in time for a request."""
        ...

    @property
    def count(self) -> int:
        """The number of devices, at least 1."""
        ...

    @property
    def waiting(self) -> int:
        """The number of requests that no device has begun."""
        ...

    @property
    def running(self) -> int:
        """The number of requests that a device has begun and that have no answer."""
        ...

    @property
    def seconds_ahead(self) -> float:
        """The estimated time, in seconds, that a new request would wait for those before it."""
        ...

    def place_of(self, pending: Pending) -> tuple[int, float]:
        """Return how many requests are before one in the queue, and the estimated seconds that it will wait.

        Both are 0 if it does not wait, or where there is no queue.
        """
        ...

    async def start(self) -> None:
        """Make the devices usable. Raises ConfigError."""
        ...

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read a model's config.json, not its weights. is_local_only: do not use the network.

        Raises ModelUnavailable.
        """
        ...

    async def load(self, coder: CoderId) -> None:
        """Load one direction of a model on every device that may run it. Raises ModelUnavailable."""
        ...

    def loaded(self, model: str) -> list[LoadedInfo]:
        """Return one entry for each device that has the model loaded."""
        ...

    def load_failure(self, coder: CoderId) -> ModelUnavailable | None:
        """Return the error of a coder that did not load, as long as no device will try again; None otherwise.

        Its `retry_after_s` is the time until the next attempt.
        """
        ...

    async def answer(self, pending: Pending) -> RenderedResult:
        """Queue a request and wait for its result. Cancelling takes it out of the queue, or stops its work.

        Raises DeadlinePassed at once if it cannot be done in time; ModelUnavailable, WorkerCrashed, and the errors of
        the engine.
        """
        ...

    def kill(self) -> None:
        """End all work at once. Requests without an answer fail."""
        ...

    async def close(self) -> None:
        """Release the devices."""
        ...


class WorkerDied(Exception):
    """The process of an engine has ended, and with it every batch that it had."""


class Engine(Protocol):
    """One device: in a worker process, or in this process."""

    is_alive: bool

    @property
    def steps(self) -> int:
        """How many steps of work have begun on the device. As long as it grows, the work makes progress."""
        ...

    async def start(self, changed: Callable[[], None]) -> Sequence[Engine]:
        """Make the device usable, and return engines, not started, for the other devices of its kind.

        changed: to be called whenever `is_alive` has changed. Raises ConfigError.
        """
        ...

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read a model's config.json, not its weights. is_local_only: do not use the network.

        Raises ModelUnavailable.
        """
        ...

    def can_run(self, model: str) -> bool:
        """Return whether the model may run on this device."""
        ...

    async def load(self, coder: CoderId) -> None:
        """Load one direction of a model. Raises ModelUnavailable."""
        ...

    def loaded(self, model: str) -> LoadedInfo | None:
        """Return what is known of a loaded model; None if no direction of it is loaded."""
        ...

    async def run(self, batch: Batch) -> None:
        """Compute and render a batch, and answer each of its requests.

        Loads the model if it was unloaded. Raises WorkerDied; requests without an answer may then be tried again.
        """
        ...

    def kill(self, reason: str) -> None:
        """End work that hangs. `run` raises WorkerDied, and the engine restarts by itself. reason: for the log."""
        ...

    async def close(self) -> None:
        """Release threads, processes and the device."""
        ...
