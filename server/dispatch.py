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
from server.config import ServerOptions
from server.errors import DeadlinePassed, ModelUnavailable, ServerError, Unavailable, WorkerCrashed
from server.types import Done, Half, LoadedInfo, ModelInfo, Operation, VAERequest

log = logging.getLogger(__name__)

STAGED = 2  # batches in an engine: one on the device, one ready to be
MAX_DEATHS = 2
MAX_TRIES = 5
STAGED_S = 0.25  # work that takes longer does not gain by being there early


@dataclass(eq=False, kw_only=True)
class Job(Ticket):
    """A request in the queue, and the answer that its client waits for."""

    model: Half
    request: VAERequest
    answer: asyncio.Future[Done]
    started: float | None = None  # when a device last began with it
    deaths: int = 0  # of workers while they decoded it
    tries: int = 0  # that a worker's death ended, wherever the job was
    on_start: Callable[[], None] = lambda: None

    @staticmethod
    def of(request: VAERequest, *, seconds: float, deadline: float, is_alone: bool = False) -> Job:
        """A job that arrives now."""
        loop, work = asyncio.get_running_loop(), request.job
        half = Half(work.model, work.operation)
        return Job(
            model=half,
            key=(half, work.geometry.key, work.layout),
            pixels=work.geometry.pixels,
            seconds=seconds,
            arrived=loop.time(),
            deadline=deadline,
            is_alone=is_alone,
            request=request,
            answer=loop.create_future(),
        )

    def start(self) -> None:
        self.started = asyncio.get_running_loop().time()
        self.on_start()

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
                job.start()
            self.started.set_result(None)

    def free_device(self) -> None:
        if not self.decoded.done():
            self.decoded.set_result(None)


class Devices(Protocol):
    """Where jobs run: the engines of this process (Dispatcher), or a cluster's replicas."""

    @property
    def is_alive(self) -> bool:
        """Whether there is a device, or will be in time for a request."""
        ...

    @property
    def count(self) -> int:
        """How many there are, at least 1."""
        ...

    @property
    def waiting(self) -> int:
        """Jobs that no device has begun."""
        ...

    @property
    def running(self) -> int:
        """Jobs that a device has begun."""
        ...

    @property
    def seconds_ahead(self) -> float:
        """How long a job that came now would wait, by what is known of those before it."""
        ...

    async def start(self) -> None:
        """Make them usable. Raises ConfigError."""
        ...

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read config.json, not the weights; without the network on demand. Raises ModelUnavailable."""
        ...

    async def load(self, model: str) -> None:
        """Bring the weights to every device that may run it. Raises ModelUnavailable."""
        ...

    def loaded(self, model: str) -> list[LoadedInfo]:
        """On each device that holds it."""
        ...

    async def answer(self, job: Job) -> Done:
        """Queue the job and wait. Cancelling takes it out; once started, its result is dropped."""
        ...

    async def close(self) -> None:
        """Let go of all of them."""
        ...


class WorkerDied(Exception):
    """The process of an engine is gone, and with it every batch that it had."""


class Engine(Protocol):
    """Whatever owns one device: this process, or a worker process."""

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

    async def load(self, model: str, operation: Operation = Operation.DECODE) -> None:
        """Bring the weights of one direction to the device. Raises ModelUnavailable."""
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


def _holds(engine: Engine, half: Half) -> bool:
    info = engine.loaded(half.model)
    return info is not None and info.runs(half.operation)


class Dispatcher:
    """Feeds every engine from one queue. `pump` runs whenever something changed: it starts whatever can start."""

    def __init__(self, engines: Sequence[Engine], options: ServerOptions) -> None:
        """engines: of the devices that are known; those that they find at their start join them."""
        self.engines = list(engines)
        self.queue: Queue[Job] = Queue(options.batch_pixels, options.max_batch)
        self.batches: dict[Engine, set[Batch]] = defaultdict(set)
        self._hang_timeout_s = options.hang_timeout_s
        self._loading: set[tuple[Engine, Half]] = set()
        self._refused: dict[tuple[Engine, Half], float] = {}  # an engine that could not load a model, until when
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every engine, and those of the devices that they find. Raises ConfigError."""
        for engine in self.engines:  # grows on the way
            self.engines += await engine.start(self.pump)

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        engine = max(self._engines_for(model), key=lambda engine: engine.is_alive)
        return await engine.describe(model, is_local_only=is_local_only)

    async def load(self, model: str) -> None:
        for engine in self._engines_for(model):
            await engine.load(model)

    def loaded(self, model: str) -> list[LoadedInfo]:
        return [info for engine in self.engines if (info := engine.loaded(model)) is not None]

    async def answer(self, job: Job) -> Done:
        self.queue.put(job)
        self.pump()
        try:
            return await job.answer
        finally:
            self.queue.remove(job)

    @property
    def is_alive(self) -> bool:
        return any(engine.is_alive for engine in self.engines)

    @property
    def count(self) -> int:
        return len(self.engines)

    @property
    def waiting(self) -> int:
        staged = (job for batch in self._all_batches() if not batch.started.done() for job in batch.jobs)
        return len(self.queue) + sum(job.is_wanted for job in staged)

    @property
    def running(self) -> int:
        return sum(job.is_wanted for batch in self._all_batches() if batch.started.done() for job in batch.jobs)

    @property
    def seconds_ahead(self) -> float:
        running = sum(job.seconds for batch in self._all_batches() for job in batch.jobs if not batch.decoded.done())
        alive = sum(engine.is_alive for engine in self.engines)
        return (running + sum(job.seconds for job in self.queue)) / max(1, alive)

    def pump(self) -> None:
        for late in self.queue.expire(asyncio.get_running_loop().time()):
            late.failed(DeadlinePassed("its deadline passed while it waited; try later"))
        alive = sorted((engine for engine in self.engines if engine.is_alive), key=self._undecoded)
        for engine in alive:
            self._feed(engine)
        for engine in alive:
            self._load_what_waits(engine)

    def kill(self) -> None:
        """End every engine at once."""
        for engine in self.engines:
            engine.kill()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def _engines_for(self, model: str) -> list[Engine]:
        return [engine for engine in self.engines if engine.can_run(model)]

    def _all_batches(self) -> Iterator[Batch]:
        return chain.from_iterable(self.batches.values())

    def _undecoded(self, engine: Engine) -> int:
        return sum(not batch.decoded.done() for batch in self.batches[engine])

    def _feed(self, engine: Engine) -> None:
        """Models that are not there wait in the queue for their load, so that they keep nobody from the device."""

        def is_there(half: Half) -> bool:
            return engine.can_run(half.model) and _holds(engine, half)

        while (undecoded := self._undecoded(engine)) < STAGED:
            # While the device works, what waits may yet become a larger batch, and long work is staged soon enough.
            jobs = self.queue.take(is_there, ahead_of_time_s=STAGED_S if undecoded else None)
            if not jobs:
                return
            batch = Batch(jobs)
            self.batches[engine].add(batch)
            self._spawn(self._run(engine, batch))

    def _load_what_waits(self, engine: Engine) -> None:
        """A model that no engine has, or that this one lacks while it is idle."""
        for half in dict.fromkeys(job.model for job in self.queue):
            if not engine.can_run(half.model) or _holds(engine, half) or self._is_refused(engine, half):
                continue
            is_wanted = not self._is_coming(half) or not self._undecoded(engine)
            if is_wanted and (engine, half) not in self._loading:
                self._loading.add((engine, half))
                self._spawn(self._load(engine, half))

    def _is_coming(self, half: Half) -> bool:
        """Whether an engine has it, or soon will."""
        alive = (engine for engine in self.engines if engine.is_alive)
        return any(_holds(engine, half) or (engine, half) in self._loading for engine in alive)

    def _is_refused(self, engine: Engine, half: Half) -> bool:
        return self._refused.get((engine, half), 0.0) > asyncio.get_running_loop().time()

    async def _load(self, engine: Engine, half: Half) -> None:
        try:
            await engine.load(*half)
        except ModelUnavailable as error:
            self._refused[engine, half] = asyncio.get_running_loop().time() + (error.retry_after_s or 0)
            self._fail_waiting(half, error)
        except Unavailable:  # the worker died, perhaps of this load
            for job in self._waiting_for(half):
                self._count_death(job)
        except Exception as error:  # the border of a load: every waiter is answered
            log.exception("%s failed to load", half.model)
            self._refused[engine, half] = asyncio.get_running_loop().time() + STAGED_S
            self._fail_waiting(half, error)
        finally:
            self._loading.discard((engine, half))
            self.pump()

    def _waiting_for(self, half: Half) -> list[Job]:
        return [job for job in self.queue if job.model == half]

    def _fail_waiting(self, half: Half, error: Exception) -> None:
        """Unless another engine may still load it."""
        others = (engine for engine in self.engines if engine.is_alive and engine.can_run(half.model))
        if any(not self._is_refused(engine, half) for engine in others):
            return
        for job in self._waiting_for(half):
            self.queue.remove(job)
            job.failed(error)

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
            self.batches[engine].discard(batch)
            batch.free_device()

    async def _watch(self, engine: Engine, batch: Batch) -> None:
        """A kernel or an encoder that hangs cannot be cancelled, only its process can be ended.

        The time counts from the start: a client with little patience, or one that waited long, does no harm to others.
        """
        # What was handed over waits for no more than the batch before it.
        await asyncio.wait([batch.started], timeout=2 * self._hang_timeout_s)
        if batch.started.done():
            await asyncio.sleep(self._hang_timeout_s)
        log.error("a request is in work for more than %g s; its worker is ended", self._hang_timeout_s)
        engine.kill()

    def _retry(self, batch: Batch) -> None:
        was_on_device = batch.started.done() and not batch.decoded.done()
        for job in batch.jobs:
            job.deaths += was_on_device
            if self._count_death(job) and job.is_wanted:
                job.is_alone = job.deaths > 0
                self.queue.put(job)
        self.pump()

    def _count_death(self, job: Job) -> bool:
        """Whether the job may be tried again after a worker died with it in hand."""
        job.tries += 1
        if job.deaths < MAX_DEATHS and job.tries < MAX_TRIES:
            return True
        self.queue.remove(job)
        job.failed(WorkerCrashed("the worker that ran this request ended again"))
        return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
