"""From the queue to the devices and back: batches, retries, hung workers. Knows engines, not what they do.

Each engine gets its next batch while it decodes one, if that batch is full, so that the device does not wait for bytes.
A worker that dies takes nothing along: what it had not started goes back to the queue, what it had started goes back
once, alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from server.batching import Queue, Ticket
from server.errors import DeadlinePassed, ServerError, WorkerCrashed
from server.types import DecodeRequest, Done, LoadedInfo, ModelInfo

log = logging.getLogger(__name__)

STAGED = 2  # batches in an engine: one on the device, one ready to be
MAX_DEATHS = 2  # of workers while they decoded it
MAX_STARTS = 5  # whatever became of it then


@dataclass(eq=False, kw_only=True)
class Job(Ticket):
    """A request in the queue, and the answer that its client waits for."""

    request: DecodeRequest
    answer: asyncio.Future[Done]
    started: float | None = None  # when a device last began with it
    starts: int = 0
    deaths: int = 0

    def done(self, done: Done) -> None:
        if not self.answer.done():
            self.answer.set_result(done)

    def failed(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    @property
    def is_wanted(self) -> bool:
        return not self.answer.done()


class Batch:
    """Jobs that go to a device together. An engine tells, on the loop, when it starts and when it is free again."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.decoded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        if not self.started.done():
            for job in self.jobs:
                job.starts += 1
                job.started = asyncio.get_running_loop().time()
            self.started.set_result(None)

    def free_device(self) -> None:
        if not self.decoded.done():
            self.decoded.set_result(None)


class WorkerDied(Exception):
    """The process of an engine is gone, and with it every batch that it had."""


class Engine(Protocol):
    """Whatever owns one device: this process, a worker process, a Ray replica."""

    is_alive: bool

    async def start(self, changed: Callable[[], None]) -> Sequence[Engine]:
        """Make it usable, and return engines for the other devices of its kind, not started. Raises ConfigError.

        changed: to be called whenever `is_alive` changed.
        """
        ...

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read config.json, not the weights; without the network on demand. Raises ModelUnavailable."""
        ...

    def can_run(self, model: str) -> bool:
        """Whether this device is one for the model."""
        ...

    async def load(self, model: str) -> None:
        """Bring the weights to the device. Raises ModelUnavailable."""
        ...

    def loaded(self, model: str) -> LoadedInfo | None:
        """None until the weights are on the device."""
        ...

    async def run(self, batch: Batch) -> None:
        """Decode and render, loading first if it must; answers every job. Raises WorkerDied, the rest unanswered."""
        ...

    def kill(self) -> None:
        """End whatever hangs; `run` raises WorkerDied, and the engine comes back by itself."""
        ...

    async def close(self) -> None:
        """Let go of threads, processes and the device."""
        ...


class Dispatcher:
    """Feeds every engine from one queue. `pump` runs whenever something changed: it starts whatever can start."""

    def __init__(self, engines: Sequence[Engine], queue: Queue[Job], hang_grace_s: float) -> None:
        self.engines = list(engines)
        self.queue = queue
        self.running: dict[Engine, set[Batch]] = defaultdict(set)
        self._hang_grace_s = hang_grace_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every engine, and those of the devices that they find. Raises ConfigError."""
        for engine in self.engines:  # grows on the way
            self.engines += await engine.start(self.pump)

    async def answer(self, job: Job) -> Done:
        """Queue the job and wait. Cancelling takes it out; once started, its result is dropped."""
        self.queue.put(job)
        self.pump()
        try:
            return await job.answer
        finally:
            self.queue.remove(job)

    @property
    def batches(self) -> Iterator[Batch]:
        """All that engines have."""
        return chain.from_iterable(self.running.values())

    @property
    def seconds_ahead(self) -> float:
        """How long a job that came now would wait, by what is known of those before it."""
        running = sum(job.seconds for batch in self.batches for job in batch.jobs if not batch.decoded.done())
        return (running + sum(job.seconds for job in self.queue)) / len(self.engines)

    def pump(self) -> None:
        for late in self.queue.expire(asyncio.get_running_loop().time()):
            late.failed(DeadlinePassed("its deadline passed while it waited; try later"))
        while choice := self._emptiest():
            engine, is_idle = choice
            # While the device works, what waits may yet become a larger batch.
            jobs = self.queue.take(engine.can_run, only_full=not is_idle)
            if not jobs:
                return
            batch = Batch(jobs)
            self.running[engine].add(batch)
            self._spawn(self._run(engine, batch))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def _emptiest(self) -> tuple[Engine, bool] | None:
        """Of those with room for something that waits the one with the least to do, best with the model loaded."""
        choices = [
            (sum(not batch.decoded.done() for batch in self.running[engine]), engine.loaded(job.model) is None, index)
            for index, engine in enumerate(self.engines)
            if engine.is_alive and (job := next((j for j in self.queue if engine.can_run(j.model)), None))
        ]
        undecoded, _, index = min(choices, default=(STAGED, True, 0))
        return (self.engines[index], undecoded == 0) if undecoded < STAGED else None

    async def _run(self, engine: Engine, batch: Batch) -> None:
        batch.decoded.add_done_callback(lambda _: self.pump())
        watch = self._spawn(self._watch(engine, batch))
        try:
            await engine.run(batch)
        except WorkerDied:
            self._retry(batch)
        except Exception as error:  # the border of a batch: every waiter is answered
            if not isinstance(error, ServerError):
                log.exception("an engine failed")
            for job in batch.jobs:
                job.failed(error)
        finally:
            watch.cancel()
            self.running[engine].discard(batch)
            batch.free_device()

    async def _watch(self, engine: Engine, batch: Batch) -> None:
        """A kernel that hangs cannot be cancelled, only its process can be ended."""
        await batch.started
        last_deadline = max(job.deadline for job in batch.jobs)
        await asyncio.sleep(last_deadline + self._hang_grace_s - asyncio.get_running_loop().time())
        if not batch.decoded.done():
            log.error("a decode still runs %g s past its deadline; its worker is ended", self._hang_grace_s)
            engine.kill()

    def _retry(self, batch: Batch) -> None:
        was_on_device = batch.started.done() and not batch.decoded.done()
        for job in batch.jobs:
            job.deaths += was_on_device
            if job.deaths >= MAX_DEATHS or job.starts >= MAX_STARTS:
                job.failed(WorkerCrashed("the worker that decoded this ended twice; its log says why"))
            elif job.is_wanted:
                job.is_alone = job.deaths > 0
                self.queue.put(job)
        self.pump()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
