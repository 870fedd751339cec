"""Give batches from the queue to the engines, and retry them when a worker dies or hangs.

While an engine computes a batch, it gets the next one if that is full, so that the device never waits for bytes. While
it computes a long batch, it also gets short ones, which run between the steps of the long one. When a worker dies,
requests that it had not started return to the queue; a request that it had started is tried once more, in a batch of
its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import chain
from typing import Any

from ..config import ServerOptions
from ..errors import DeadlinePassed, ModelUnavailable, ServerError, Unavailable, WorkerCrashed
from ..model_info import CoderId, Direction, LoadedInfo, ModelInfo
from ..values import RenderedResult
from .engines import Batch, Engine, Pending, WorkerDied
from .fair_queue import Queue
from .load_failures import LoadFailures

log = logging.getLogger(__name__)

STAGED = 2  # batches in an engine: one on the device, one ready to be
MAX_DEATHS = 2
MAX_TRIES = 5
STAGED_S = 0.25  # work that takes longer does not gain by being there early
LOOK_AGAIN_S = 0.25  # while short work waits for its share beside long work
WATCH_S = 1.0  # between two looks at whether a batch makes progress


def _holds(engine: Engine, coder: CoderId) -> bool:
    info = engine.loaded(coder.model)
    return info is not None and info.runs(coder.direction)


def _may_run_beside(engine: Engine, coder: CoderId, batch: Batch) -> bool:
    """Whether a loaded direction may run between the steps of a batch, which may be one of its own."""
    info = engine.loaded(coder.model)
    return coder != batch.coder or (info is not None and info.may_run_inside_itself(coder.direction))


class Dispatcher:
    """Feeds every engine from one queue. `pump` runs whenever something changed: it starts whatever can start."""

    def __init__(self, engines: Sequence[Engine], options: ServerOptions) -> None:
        """engines: of the devices that are known; those that they find at their start join them."""
        self.engines = list(engines)
        self.queue: Queue[Pending] = Queue(options.batch_pixels, options.max_batch)
        self.batches: dict[Engine, set[Batch]] = defaultdict(set)
        self._hang_timeout_s = options.hang_timeout_s
        self._loading: set[tuple[Engine, CoderId]] = set()
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
                for direction in Direction:
                    self._note_failure(engines, CoderId(model, direction), error)
            raise

    async def load(self, model: str) -> None:
        for engine in self._engines_for(model):
            await engine.load(CoderId(model))

    def loaded(self, model: str) -> list[LoadedInfo]:
        return [info for engine in self.engines if (info := engine.loaded(model)) is not None]

    def load_failure(self, coder: CoderId) -> ModelUnavailable | None:
        alive = [engine for engine in self._engines_for(coder.model) if engine.is_alive]
        return self._failures.find(alive, coder)

    async def answer(self, pending: Pending) -> RenderedResult:
        if failure := self.load_failure(pending.coder):
            raise failure
        self.queue.put(pending)
        try:
            self._check_in_time(pending)
            self.pump()
            return await pending.answer
        finally:
            self.queue.remove(pending)

    @property
    def is_alive(self) -> bool:
        return any(engine.is_alive for engine in self.engines)

    @property
    def count(self) -> int:
        return len(self.engines)

    @property
    def waiting(self) -> int:
        staged = (pending for batch in self._all_batches() if not batch.started.done() for pending in batch.members)
        return len(self.queue) + sum(pending.is_wanted for pending in staged)

    @property
    def running(self) -> int:
        return sum(
            pending.is_wanted for batch in self._all_batches() if batch.started.done() for pending in batch.members
        )

    @property
    def seconds_ahead(self) -> float:
        alive = [engine for engine in self.engines if engine.is_alive]
        return (self._seconds_running(alive) + sum(pending.seconds for pending in self.queue)) / max(1, len(alive))

    def pump(self) -> None:
        for late in self.queue.expire(asyncio.get_running_loop().time()):
            late.fail(DeadlinePassed("the request's deadline passed while it waited in the queue; try again later"))
        for coder in {pending.coder for pending in self.queue}:
            self._fail_if_none_loads(coder)
        alive = sorted((engine for engine in self.engines if engine.is_alive), key=self._uncomputed)
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

    def _uncomputed(self, engine: Engine) -> int:
        return sum(not batch.computed.done() for batch in self.batches[engine])

    def _feed(self, engine: Engine) -> None:
        """Jobs whose weights are not loaded stay queued, so that loading a model never blocks the device."""

        def is_there(coder: CoderId) -> bool:
            return engine.can_run(coder.model) and _holds(engine, coder)

        while self._uncomputed(engine) < STAGED:
            batch = self._next_batch(engine, is_there)
            if batch is None:
                return
            self.batches[engine].add(batch)
            self._spawn(self._run(engine, batch))

    def _next_batch(self, engine: Engine, is_there: Callable[[CoderId], bool]) -> Batch | None:
        on_device = self._on_device(engine)
        if on_device is None:
            members = self.queue.take(is_there)
        elif on_device.short_s:

            def may_run_beside(coder: CoderId) -> bool:
                return is_there(coder) and _may_run_beside(engine, coder, on_device)

            members = self.queue.take_short(may_run_beside, on_device.short_s, on_device.used_tag)
            if members:
                return Batch(members, beside=on_device)
        else:
            # A partial batch may still grow while it waits, and a long one gains nothing by being staged.
            members = self.queue.take(is_there, ahead_of_time_s=STAGED_S)
        if not members and self.queue:
            self._look_again()
        return Batch(members) if members else None

    def _on_device(self, engine: Engine) -> Batch | None:
        return next((batch for batch in self.batches[engine] if not batch.computed.done()), None)

    def _look_again(self) -> None:
        """Pump after a while: what the device works on may turn out to be long, or may have had its share by then."""
        if self._looking is None:

            def look() -> None:
                self._looking = None
                self.pump()

            self._looking = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, look)

    def _seconds_running(self, engines: Sequence[Engine]) -> float:
        batches = chain.from_iterable(self.batches[engine] for engine in engines)
        return sum(batch.seconds_left for batch in batches if not batch.computed.done())

    def _seconds_before(self, pending: Pending) -> float:
        """How long a pending in the queue will wait, by what is known of the engines that may run it."""
        engines = [engine for engine in self._engines_for(pending.coder.model) if engine.is_alive]

        def may_come_first(other: Pending) -> bool:
            return any(engine.can_run(other.coder.model) and _holds(engine, other.coder) for engine in engines)

        short_s = max((self._short_s(engine, pending) for engine in engines), default=0.0)
        if short_s:  # it runs between the steps of what is on a device, and only short work comes first
            return self.queue.seconds_before(pending, lambda other: may_come_first(other) and other.seconds <= short_s)
        before = self.queue.seconds_before(pending, may_come_first)
        return (self._seconds_running(engines) + before) / max(1, len(engines))

    def _short_s(self, engine: Engine, pending: Pending) -> float:
        """Return how long work may be, in seconds, to run beside an engine's batch; 0 if the request may not."""
        batch = self._on_device(engine)
        if batch is None or pending.seconds > batch.short_s or not _holds(engine, pending.coder):
            return 0.0
        return batch.short_s if _may_run_beside(engine, pending.coder, batch) else 0.0

    def _check_in_time(self, pending: Pending) -> None:
        """Raise DeadlinePassed when by all that is known the pending cannot be done before its deadline."""
        if not pending.least_seconds:
            return
        left_s = pending.deadline - asyncio.get_running_loop().time()
        waits_s = self._seconds_before(pending)
        if pending.least_seconds > left_s:
            raise DeadlinePassed(
                f"this takes about {pending.least_seconds:.3g} s, its deadline is in {left_s:.3g} s; "
                "send a smaller request, or allow more time with X-Request-Timeout or --request-timeout-s"
            )
        if waits_s + pending.least_seconds > left_s:
            raise DeadlinePassed(
                f"about {waits_s:.3g} s of other requests come first and this takes about "
                f"{pending.least_seconds:.3g} s, its deadline is in {left_s:.3g} s; try later, "
                "or allow more time with X-Request-Timeout",
                retry_after_s=max(1, round(waits_s)),
            )

    def _load_what_waits(self, engine: Engine) -> None:
        """A model that no engine has, or that this one lacks while it is idle."""
        for coder in dict.fromkeys(pending.coder for pending in self.queue):
            if not engine.can_run(coder.model) or _holds(engine, coder) or self._failures.find([engine], coder):
                continue
            is_wanted = not self._is_coming(coder) or not self._uncomputed(engine)
            if is_wanted and (engine, coder) not in self._loading:
                self._loading.add((engine, coder))
                self._spawn(self._load(engine, coder))

    def _is_coming(self, coder: CoderId) -> bool:
        """Whether an engine has it, or soon will."""
        alive = (engine for engine in self.engines if engine.is_alive)
        return any(_holds(engine, coder) or (engine, coder) in self._loading for engine in alive)

    def _note_failure(self, engines: Sequence[Engine], coder: CoderId, error: ModelUnavailable) -> None:
        """Remember a failed load, answer the requests that wait for it, and pump when the next attempt may begin."""
        for engine in engines:
            self._failures.note(engine, coder, error)
        self._fail_if_none_loads(coder)
        asyncio.get_running_loop().call_later(error.retry_after_s or 0, self.pump)

    def _fail_if_none_loads(self, coder: CoderId) -> None:
        """Answer the members that wait for a direction that no engine will load for now."""
        if failure := self.load_failure(coder):
            for pending in self._waiting_for(coder):
                self.queue.remove(pending)
                pending.fail(failure)

    async def _load(self, engine: Engine, coder: CoderId) -> None:
        try:
            await engine.load(coder)
        except ModelUnavailable as error:
            log.error("%s", error.detail)
            self._note_failure([engine], coder, error)
        except Unavailable:  # the worker died, perhaps of this load
            for pending in self._waiting_for(coder):
                self._count_death(pending)
        except Exception as error:  # the border of a load: every waiter is answered
            log.exception("%s failed to load", coder.model)
            self._note_failure([engine], coder, ModelUnavailable(coder.model, f"{coder.model}: {error!r}"))
        finally:
            self._loading.discard((engine, coder))
            self.pump()

    def _waiting_for(self, coder: CoderId) -> list[Pending]:
        return [pending for pending in self.queue if pending.coder == coder]

    async def _run(self, engine: Engine, batch: Batch) -> None:
        batch.computed.add_done_callback(lambda _: self.pump())
        watch = self._spawn(self._watch(engine, batch))
        try:
            await engine.run(batch)
            self._note_failed_load(engine, batch)
        except WorkerDied:
            self._retry(batch)
        except Exception as error:  # the border of a batch: every waiter is answered
            if not isinstance(error, ServerError):
                log.exception("an engine failed")
            for pending in batch.members:
                pending.fail(error)
        finally:
            watch.cancel()
            self.batches[engine].discard(batch)
            batch.note_computed()

    def _note_failed_load(self, engine: Engine, batch: Batch) -> None:
        """A model may have been unloaded after its members were taken, and fail to load again."""
        for answer in (pending.answer for pending in batch.members):
            if answer.done() and not answer.cancelled() and isinstance(answer.exception(), ModelUnavailable):
                error = answer.exception()
                assert isinstance(error, ModelUnavailable)
                log.error("%s", error.detail)
                self._note_failure([engine], batch.coder, error)
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
            if engine.steps != steps and not batch.computed.done():
                steps, since = engine.steps, clock()
            if clock() - since > self._hang_timeout_s * (1 if batch.started.done() else 2):
                engine.kill(f"a request made no progress for {self._hang_timeout_s:g} s")
                return

    def _retry(self, batch: Batch) -> None:
        was_on_device = batch.started.done() and not batch.computed.done()
        for pending in batch.members:
            pending.deaths += was_on_device
            if self._count_death(pending) and pending.is_wanted:
                pending.is_alone = pending.deaths > 0
                self.queue.put(pending)
        self.pump()

    def _count_death(self, pending: Pending) -> bool:
        """Whether the pending may be tried again after a worker died with it in hand."""
        pending.tries += 1
        if pending.deaths < MAX_DEATHS and pending.tries < MAX_TRIES:
            return True
        self.queue.remove(pending)
        pending.fail(WorkerCrashed("the worker process crashed again while this request was in it"))
        return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
