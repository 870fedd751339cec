"""From the queue to the devices and back: batches, retries, hung workers. Knows engines, not what they do.

Each engine gets its next batch while it computes one, if that batch is full: the device never waits for bytes. While
it computes a long one, it gets short batches too, to run between the steps of the long one. If a worker dies, jobs that
it had not started go back to the queue; a job that it had started is tried once more, in a batch of its own.
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
from server.load_failures import LoadFailures
from server.types import Done, Half, LoadedInfo, ModelInfo, Operation, VAERequest

log = logging.getLogger(__name__)

STAGED = 2  # batches in an engine: one on the device, one ready to be
MAX_DEATHS = 2
MAX_TRIES = 5
STAGED_S = 0.25  # work that takes longer does not gain by being there early
LONG_S = 1.0  # batches that take longer give way to shorter ones between their steps
SHORT_SHARE = 0.25  # a batch is short beside a long one if it takes at most this share of the long one's time
LOOK_AGAIN_S = 0.25  # while short work waits for its share beside long work
WATCH_S = 1.0  # between two looks at whether a batch makes progress


@dataclass(eq=False, kw_only=True)
class Job(Ticket):
    """A request in the queue, and the answer that its client waits for."""

    model: Half
    request: VAERequest
    answer: asyncio.Future[Done]
    started: float | None = None  # when a device last began with it
    deaths: int = 0  # of workers while they decoded it
    tries: int = 0  # that a worker's death ended, wherever the job was
    least_seconds: float = 0.0  # what its work takes at least, 0 when that is not known
    on_start: Callable[[], None] = lambda: None

    @staticmethod
    def of(
        request: VAERequest, *, seconds: float, deadline: float, least_seconds: float = 0.0, is_alone: bool = False
    ) -> Job:
        """Make a job that arrives now. seconds: what its work usually takes on the device."""
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
            least_seconds=least_seconds,
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

    def __init__(self, jobs: Sequence[Job], beside: Batch | None = None) -> None:
        """beside: a longer batch between whose steps this one may run."""
        self.jobs = jobs
        self.beside = beside
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.decoded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started_at = 0.0
        self._gave_away_s = 0.0  # to batches that ran between its steps

    @property
    def is_short(self) -> bool:
        """Whether it may run between the steps of another batch."""
        return self.beside is not None

    @property
    def seconds(self) -> float:
        """How long all of it usually takes on the device."""
        return sum(job.seconds for job in self.jobs)

    @property
    def seconds_done(self) -> float:
        """For how long the device has worked on it."""
        if not self.started.done():
            return 0.0
        return asyncio.get_running_loop().time() - self._started_at - self._gave_away_s

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.seconds - self.seconds_done)

    @property
    def short_s(self) -> float:
        """Up to how many seconds of work may run between its steps; 0 while it has not started, or is not long."""
        long_s = max(self.seconds, self.seconds_done)
        return SHORT_SHARE * long_s if self.started.done() and long_s > LONG_S else 0.0

    @property
    def used_tag(self) -> float:
        """The virtual time of the queue that this batch has used up so far."""
        return (self.jobs[0].tag or 0.0) + self.seconds_done

    def start(self) -> None:
        if not self.started.done():
            for job in self.jobs:
                job.start()
            self._started_at = asyncio.get_running_loop().time()
            self.started.set_result(None)

    def free_device(self) -> None:
        if self.decoded.done():
            return
        if self.beside and self.started.done():
            self.beside._gave_away_s += self.seconds_done
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

    def load_failure(self, half: Half) -> ModelUnavailable | None:
        """The error of a direction that did not load, while no device will try it again; None otherwise.

        Its `retry_after_s` says for how long that is.
        """
        ...

    async def answer(self, job: Job) -> Done:
        """Queue the job and wait for its result. Cancelling takes it out of the queue, or stops its work.

        Raises DeadlinePassed at once if it cannot be done in time, ModelUnavailable, WorkerCrashed, and what the
        engine says of this job.
        """
        ...

    async def close(self) -> None:
        """Let go of all of them."""
        ...


class WorkerDied(Exception):
    """The process of an engine is gone, and with it every batch that it had."""


class Engine(Protocol):
    """Whatever owns one device: this process, or a worker process."""

    is_alive: bool

    @property
    def steps(self) -> int:
        """How many steps of work have begun on the device. While it grows, the work makes progress."""
        ...

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

    def kill(self, reason: str) -> None:
        """End whatever hangs; `run` raises WorkerDied, and the engine comes back by itself. reason: for the log."""
        ...

    async def close(self) -> None:
        """Let go of threads, processes and the device."""
        ...


def _holds(engine: Engine, half: Half) -> bool:
    info = engine.loaded(half.model)
    return info is not None and info.runs(half.operation)


def _may_run_beside(engine: Engine, half: Half, batch: Batch) -> bool:
    """Whether a loaded direction may run between the steps of a batch, which may be one of its own."""
    info = engine.loaded(half.model)
    return half != batch.jobs[0].model or (info is not None and info.may_run_inside_itself(half.operation))


class Dispatcher:
    """Feeds every engine from one queue. `pump` runs whenever something changed: it starts whatever can start."""

    def __init__(self, engines: Sequence[Engine], options: ServerOptions) -> None:
        """engines: of the devices that are known; those that they find at their start join them."""
        self.engines = list(engines)
        self.queue: Queue[Job] = Queue(options.batch_pixels, options.max_batch)
        self.batches: dict[Engine, set[Batch]] = defaultdict(set)
        self._hang_timeout_s = options.hang_timeout_s
        self._loading: set[tuple[Engine, Half]] = set()
        self._failures = LoadFailures(lambda: asyncio.get_running_loop().time())
        self._looking: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every engine, and those of the devices that they find. Raises ConfigError."""
        for engine in self.engines:  # grows on the way
            self.engines += await engine.start(self.pump)

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        engines = self._engines_for(model)
        engine = max(engines, key=lambda engine: engine.is_alive)
        try:
            return await engine.describe(model, is_local_only=is_local_only)
        except ModelUnavailable as error:
            if not is_local_only:
                log.error("%s", error.detail)
                for operation in Operation:
                    self._note_failure(engines, Half(model, operation), error)
            raise

    async def load(self, model: str) -> None:
        for engine in self._engines_for(model):
            await engine.load(model)

    def loaded(self, model: str) -> list[LoadedInfo]:
        return [info for engine in self.engines if (info := engine.loaded(model)) is not None]

    def load_failure(self, half: Half) -> ModelUnavailable | None:
        alive = [engine for engine in self._engines_for(half.model) if engine.is_alive]
        return self._failures.find(alive, half)

    async def answer(self, job: Job) -> Done:
        if failure := self.load_failure(job.model):
            raise failure
        self.queue.put(job)
        try:
            self._check_in_time(job)
            self.pump()
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
        alive = [engine for engine in self.engines if engine.is_alive]
        return (self._seconds_running(alive) + sum(job.seconds for job in self.queue)) / max(1, len(alive))

    def pump(self) -> None:
        for late in self.queue.expire(asyncio.get_running_loop().time()):
            late.failed(DeadlinePassed("the request's deadline passed while it waited in the queue; try again later"))
        for half in {job.model for job in self.queue}:
            self._fail_if_none_loads(half)
        alive = sorted((engine for engine in self.engines if engine.is_alive), key=self._undecoded)
        for engine in alive:
            self._feed(engine)
        for engine in alive:
            self._load_what_waits(engine)

    def kill(self) -> None:
        """End every engine at once."""
        for engine in self.engines:
            engine.kill("the server ends")

    async def close(self) -> None:
        if self._looking:
            self._looking.cancel()
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
        """Jobs whose weights are not loaded stay queued, so that loading a model never blocks the device."""

        def is_there(half: Half) -> bool:
            return engine.can_run(half.model) and _holds(engine, half)

        while self._undecoded(engine) < STAGED:
            batch = self._next_batch(engine, is_there)
            if batch is None:
                return
            self.batches[engine].add(batch)
            self._spawn(self._run(engine, batch))

    def _next_batch(self, engine: Engine, is_there: Callable[[Half], bool]) -> Batch | None:
        on_device = self._on_device(engine)
        if on_device is None:
            jobs = self.queue.take(is_there)
        elif on_device.short_s:

            def may_run_beside(half: Half) -> bool:
                return is_there(half) and _may_run_beside(engine, half, on_device)

            jobs = self.queue.take_short(may_run_beside, on_device.short_s, on_device.used_tag)
            if jobs:
                return Batch(jobs, beside=on_device)
        else:
            # A partial batch may still grow while it waits, and a long one gains nothing by being staged.
            jobs = self.queue.take(is_there, ahead_of_time_s=STAGED_S)
        if not jobs and self.queue:
            self._look_again()
        return Batch(jobs) if jobs else None

    def _on_device(self, engine: Engine) -> Batch | None:
        return next((batch for batch in self.batches[engine] if not batch.decoded.done()), None)

    def _look_again(self) -> None:
        """Pump after a while: what the device works on may turn out to be long, or may have had its share by then."""
        if self._looking is None:

            def look() -> None:
                self._looking = None
                self.pump()

            self._looking = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, look)

    def _seconds_running(self, engines: Sequence[Engine]) -> float:
        batches = chain.from_iterable(self.batches[engine] for engine in engines)
        return sum(batch.seconds_left for batch in batches if not batch.decoded.done())

    def _seconds_before(self, job: Job) -> float:
        """How long a job in the queue will wait, by what is known of the engines that may run it."""
        engines = [engine for engine in self._engines_for(job.model.model) if engine.is_alive]

        def may_come_first(other: Job) -> bool:
            return any(engine.can_run(other.model.model) and _holds(engine, other.model) for engine in engines)

        short_s = max((self._short_s(engine, job) for engine in engines), default=0.0)
        if short_s:  # it runs between the steps of what is on a device, and only short work comes first
            return self.queue.seconds_before(job, lambda other: may_come_first(other) and other.seconds <= short_s)
        before = self.queue.seconds_before(job, may_come_first)
        return (self._seconds_running(engines) + before) / max(1, len(engines))

    def _short_s(self, engine: Engine, job: Job) -> float:
        """Up to how many seconds of work may run between the steps of what an engine computes; 0 if the job may not."""
        batch = self._on_device(engine)
        if batch is None or job.seconds > batch.short_s or not _holds(engine, job.model):
            return 0.0
        return batch.short_s if _may_run_beside(engine, job.model, batch) else 0.0

    def _check_in_time(self, job: Job) -> None:
        """Raise DeadlinePassed when by all that is known the job cannot be done before its deadline."""
        if not job.least_seconds:
            return
        left_s = job.deadline - asyncio.get_running_loop().time()
        waits_s = self._seconds_before(job)
        if job.least_seconds > left_s:
            raise DeadlinePassed(
                f"this takes about {job.least_seconds:.3g} s, its deadline is in {left_s:.3g} s; "
                "send a smaller request, or allow more time with X-Request-Timeout or --request-timeout-s"
            )
        if waits_s + job.least_seconds > left_s:
            raise DeadlinePassed(
                f"about {waits_s:.3g} s of other requests come first and this takes about {job.least_seconds:.3g} s, "
                f"its deadline is in {left_s:.3g} s; try later, or allow more time with X-Request-Timeout",
                retry_after_s=max(1, round(waits_s)),
            )

    def _load_what_waits(self, engine: Engine) -> None:
        """A model that no engine has, or that this one lacks while it is idle."""
        for half in dict.fromkeys(job.model for job in self.queue):
            if not engine.can_run(half.model) or _holds(engine, half) or self._failures.find([engine], half):
                continue
            is_wanted = not self._is_coming(half) or not self._undecoded(engine)
            if is_wanted and (engine, half) not in self._loading:
                self._loading.add((engine, half))
                self._spawn(self._load(engine, half))

    def _is_coming(self, half: Half) -> bool:
        """Whether an engine has it, or soon will."""
        alive = (engine for engine in self.engines if engine.is_alive)
        return any(_holds(engine, half) or (engine, half) in self._loading for engine in alive)

    def _note_failure(self, engines: Sequence[Engine], half: Half, error: ModelUnavailable) -> None:
        """Remember the failure, answer the jobs that wait for this load, and pump when the next attempt may begin."""
        for engine in engines:
            self._failures.note(engine, half, error)
        self._fail_if_none_loads(half)
        asyncio.get_running_loop().call_later(error.retry_after_s or 0, self.pump)

    def _fail_if_none_loads(self, half: Half) -> None:
        """Answer the jobs that wait for a direction that no engine will load for now."""
        if failure := self.load_failure(half):
            for job in self._waiting_for(half):
                self.queue.remove(job)
                job.failed(failure)

    async def _load(self, engine: Engine, half: Half) -> None:
        try:
            await engine.load(*half)
        except ModelUnavailable as error:
            log.error("%s", error.detail)
            self._note_failure([engine], half, error)
        except Unavailable:  # the worker died, perhaps of this load
            for job in self._waiting_for(half):
                self._count_death(job)
        except Exception as error:  # the border of a load: every waiter is answered
            log.exception("%s failed to load", half.model)
            self._note_failure([engine], half, ModelUnavailable(half.model, f"{half.model}: {error!r}"))
        finally:
            self._loading.discard((engine, half))
            self.pump()

    def _waiting_for(self, half: Half) -> list[Job]:
        return [job for job in self.queue if job.model == half]

    async def _run(self, engine: Engine, batch: Batch) -> None:
        batch.decoded.add_done_callback(lambda _: self.pump())
        watch = self._spawn(self._watch(engine, batch))
        try:
            await engine.run(batch)
            self._note_failed_load(engine, batch)
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

    def _note_failed_load(self, engine: Engine, batch: Batch) -> None:
        """A model may have been unloaded after its jobs were taken, and fail to load again."""
        for answer in (job.answer for job in batch.jobs):
            if answer.done() and not answer.cancelled() and isinstance(answer.exception(), ModelUnavailable):
                error = answer.exception()
                assert isinstance(error, ModelUnavailable)
                log.error("%s", error.detail)
                self._note_failure([engine], batch.jobs[0].model, error)
                return

    async def _watch(self, engine: Engine, batch: Batch) -> None:
        """End the engine's process when its work makes no progress for `hang_timeout_s`.

        A kernel or an encoder that hangs cannot be cancelled. Work that goes on step by step is never ended, however
        long it takes. Twice the time before the batch has started, because it waits for the one before it.
        """
        clock = asyncio.get_running_loop().time
        steps, since = engine.steps, clock()
        while True:
            await asyncio.sleep(min(WATCH_S, self._hang_timeout_s / 4))
            if engine.steps != steps and not batch.decoded.done():
                steps, since = engine.steps, clock()
            if clock() - since > self._hang_timeout_s * (1 if batch.started.done() else 2):
                engine.kill(f"a request made no progress for {self._hang_timeout_s:g} s")
                return

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
        job.failed(WorkerCrashed("the worker process crashed again while this request was in it"))
        return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
