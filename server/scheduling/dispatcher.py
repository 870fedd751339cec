"""Give batches from the queue to the engines, and retry them when a worker dies or hangs.

While an engine computes a batch, it gets the next one if that is full and short enough, so that the device never waits
for bytes. While it computes a long batch, it also gets short ones, which run between the steps of the long one. When a
worker dies, requests that it had not started return to the queue; a request that it had started is tried once more, in
a batch of its own.
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

STAGED = 2  # the most batches in an engine: one on the device, and one that is ready to follow it
MAX_DEATHS = 2  # a request fails when this many workers have died while computing it
MAX_TRIES = 5  # a request fails when the death of a worker has ended this many of its attempts
STAGED_S = 0.25  # a batch that takes longer gains nothing from being staged
LOOK_AGAIN_S = 0.25  # the time until the next pump while requests wait and no batch can be given to an engine
WATCH_S = 1.0  # the time between two checks of whether a batch makes progress


def _holds(engine: Engine, coder: CoderId) -> bool:
    """Return whether an engine has a coder loaded."""
    info = engine.loaded(coder.model)
    return info is not None and info.runs(coder.direction)


def _may_run_beside(engine: Engine, coder: CoderId, batch: Batch) -> bool:
    """Return whether a loaded coder may run between the steps of a batch, which may be a batch of the same coder."""
    info = engine.loaded(coder.model)
    return coder != batch.coder or (info is not None and info.may_run_inside_itself(coder.direction))


class Dispatcher:
    """The devices of this machine: gives the requests of one queue to several engines.

    `pump` runs whenever something has changed, and starts all work that can start. The public methods are described in
    `Devices`.
    """

    def __init__(self, engines: Sequence[Engine], options: ServerOptions) -> None:
        """Make a dispatcher.

        engines: one for each known device. Engines of further devices are added when these start.
        """
        self.engines = list(engines)
        self.queue: Queue[Pending] = Queue(options.batch_pixels, options.max_batch)
        self.batches: dict[Engine, set[Batch]] = defaultdict(set)
        self._hang_timeout_s = options.hang_timeout_s
        self._loading: set[tuple[Engine, CoderId]] = set()
        self._failures = LoadFailures(lambda: asyncio.get_running_loop().time())
        self._looking: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every engine, and the engines of the devices that they find. Raises ConfigError."""
        for engine in self.engines:  # the list grows in the loop
            self.engines += await engine.start(self.pump)

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read a model's config.json. Without `is_local_only`, a failure counts as a failed load of both directions."""
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

    async def load(self, coder: CoderId) -> None:
        """Load one direction of a model on every engine that may run it."""
        for engine in self._engines_for(coder.model):
            await engine.load(coder)

    def loaded(self, model: str) -> list[LoadedInfo]:
        """Return one entry for each engine that has the model loaded."""
        return [info for engine in self.engines if (info := engine.loaded(model)) is not None]

    def load_failure(self, coder: CoderId) -> ModelUnavailable | None:
        """Return why no running engine will load a coder for now; None if one has it or may try."""
        alive = [engine for engine in self._engines_for(coder.model) if engine.is_alive]
        return self._failures.find(alive, coder)

    async def answer(self, pending: Pending) -> RenderedResult:
        """Queue a request and wait for its result. Cancelling removes it from the queue, or stops its work."""
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
        """Whether at least one engine is running."""
        return any(engine.is_alive for engine in self.engines)

    @property
    def count(self) -> int:
        """The number of engines."""
        return len(self.engines)

    @property
    def waiting(self) -> int:
        """The number of requests that no device has begun: those in the queue and those in staged batches."""
        staged = (pending for batch in self._all_batches() if not batch.started.done() for pending in batch.members)
        return len(self.queue) + sum(pending.is_wanted for pending in staged)

    @property
    def running(self) -> int:
        """The number of requests that a device has begun and that have no answer yet."""
        return sum(
            pending.is_wanted for batch in self._all_batches() if batch.started.done() for pending in batch.members
        )

    @property
    def seconds_ahead(self) -> float:
        """The estimated time, in seconds, until the engines have done all work that they have and that waits."""
        alive = [engine for engine in self.engines if engine.is_alive]
        return (self._seconds_running(alive) + sum(pending.seconds for pending in self.queue)) / max(1, len(alive))

    def place_of(self, pending: Pending) -> tuple[int, float]:
        """Return how many requests are before one in the queue, and the estimated seconds that it will wait."""
        waiting = list(self.queue)
        if pending not in waiting:
            return 0, 0.0
        return waiting.index(pending), self._seconds_before(pending)

    def pump(self) -> None:
        """Fail the requests that cannot be served, give batches to the engines, and start loading needed models."""
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
        """End every engine immediately."""
        for engine in self.engines:
            engine.kill("the server is shutting down")

    async def close(self) -> None:
        """Cancel all work and close every engine."""
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
        """Return how many batches of an engine are on the device or staged."""
        return sum(not batch.computed.done() for batch in self.batches[engine])

    def _feed(self, engine: Engine) -> None:
        """Give batches to an engine until it has STAGED of them or no batch is ready.

        Requests whose weights are not loaded stay queued, so that loading a model never blocks the device.
        """

        def is_there(coder: CoderId) -> bool:
            return engine.can_run(coder.model) and _holds(engine, coder)

        while self._uncomputed(engine) < STAGED:
            batch = self._next_batch(engine, is_there)
            if batch is None:
                return
            self.batches[engine].add(batch)
            self._spawn(self._run(engine, batch))

    def _next_batch(self, engine: Engine, is_there: Callable[[CoderId], bool]) -> Batch | None:
        """Take the next batch for an engine from the queue; None if there is none to give it now.

        is_there: returns whether the engine has a coder loaded.
        """
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
            # A batch that is not full may still grow while it waits, and a long batch gains nothing from being staged.
            members = self.queue.take(is_there, ahead_of_time_s=STAGED_S)
        if not members and self.queue:
            self._look_again()
        return Batch(members) if members else None

    def _on_device(self, engine: Engine) -> Batch | None:
        """Return a batch of the engine that is not computed yet, running or staged; None if there is none."""
        return next((batch for batch in self.batches[engine] if not batch.computed.done()), None)

    def _look_again(self) -> None:
        """Pump again after LOOK_AGAIN_S.

        By then the batch on the device may have turned out to be long, so that short work may run between its steps; or
        it may have used up its share, so that more short work may.
        """
        if self._looking is None:

            def look() -> None:
                self._looking = None
                self.pump()

            self._looking = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, look)

    def _seconds_running(self, engines: Sequence[Engine]) -> float:
        """Return the estimated seconds that these engines still need for the batches that they have."""
        batches = chain.from_iterable(self.batches[engine] for engine in engines)
        return sum(batch.seconds_left for batch in batches if not batch.computed.done())

    def _seconds_before(self, pending: Pending) -> float:
        """Return the estimated seconds that a queued request will wait for the engines that may run it."""
        engines = [engine for engine in self._engines_for(pending.coder.model) if engine.is_alive]

        def may_come_first(other: Pending) -> bool:
            return any(engine.can_run(other.coder.model) and _holds(engine, other.coder) for engine in engines)

        short_s = max((self._short_s(engine, pending) for engine in engines), default=0.0)
        if short_s:  # it runs between the steps of a longer batch, so only other short work runs before it
            return self.queue.seconds_before(pending, lambda other: may_come_first(other) and other.seconds <= short_s)
        before = self.queue.seconds_before(pending, may_come_first)
        return (self._seconds_running(engines) + before) / max(1, len(engines))

    def _short_s(self, engine: Engine, pending: Pending) -> float:
        """Return the longest time, in seconds, that work between the steps of an engine's batch may take.

        Returns 0 if this request may not run there.
        """
        batch = self._on_device(engine)
        if batch is None or pending.seconds > batch.short_s or not _holds(engine, pending.coder):
            return 0.0
        return batch.short_s if _may_run_beside(engine, pending.coder, batch) else 0.0

    def _check_in_time(self, pending: Pending) -> None:
        """Raise DeadlinePassed if even by the lowest estimate the request cannot be done before its deadline."""
        if not pending.least_seconds:
            return
        left_s = pending.deadline - asyncio.get_running_loop().time()
        waits_s = self._seconds_before(pending)
        if pending.least_seconds > left_s:
            raise DeadlinePassed(
                f"this request takes about {pending.least_seconds:.3g} s, but its deadline is in {left_s:.3g} s; "
                "send a smaller request, or allow more time (X-Request-Timeout, or the server's --request-timeout-s)"
            )
        if waits_s + pending.least_seconds > left_s:
            raise DeadlinePassed(
                f"this request takes about {pending.least_seconds:.3g} s and waits about {waits_s:.3g} s for others, "
                f"but its deadline is in {left_s:.3g} s; try again later, or allow more time with X-Request-Timeout",
                retry_after_s=max(1, round(waits_s)),
            )

    def _load_what_waits(self, engine: Engine) -> None:
        """Start to load the coders that queued requests need.

        A coder is loaded if no engine has it and none is loading it, or if this engine is idle and does not have it.
        """
        for coder in dict.fromkeys(pending.coder for pending in self.queue):
            if not engine.can_run(coder.model) or _holds(engine, coder) or self._failures.find([engine], coder):
                continue
            is_wanted = not self._is_coming(coder) or not self._uncomputed(engine)
            if is_wanted and (engine, coder) not in self._loading:
                self._loading.add((engine, coder))
                self._spawn(self._load(engine, coder))

    def _is_coming(self, coder: CoderId) -> bool:
        """Return whether a running engine has a coder loaded or is loading it."""
        alive = (engine for engine in self.engines if engine.is_alive)
        return any(_holds(engine, coder) or (engine, coder) in self._loading for engine in alive)

    def _note_failure(self, engines: Sequence[Engine], coder: CoderId, error: ModelUnavailable) -> None:
        """Remember a failed load, fail the requests that only wait for it, and pump when the next attempt may begin."""
        for engine in engines:
            self._failures.note(engine, coder, error)
        self._fail_if_none_loads(coder)
        asyncio.get_running_loop().call_later(error.retry_after_s or 0, self.pump)

    def _fail_if_none_loads(self, coder: CoderId) -> None:
        """Fail the requests that wait for a coder, if no engine will try to load it for now."""
        if failure := self.load_failure(coder):
            for pending in self._waiting_for(coder):
                self.queue.remove(pending)
                pending.fail(failure)

    async def _load(self, engine: Engine, coder: CoderId) -> None:
        """Load a coder on an engine. Failures are remembered, not raised."""
        try:
            await engine.load(coder)
        except ModelUnavailable as error:
            log.error("%s", error.detail)
            self._note_failure([engine], coder, error)
        except Unavailable:  # the worker died, perhaps because of this load
            for pending in self._waiting_for(coder):
                self._count_death(pending)
        except Exception as error:  # nothing may escape from a load: the waiting requests must be answered
            log.exception("the model '%s' failed to load", coder.model)
            self._note_failure([engine], coder, ModelUnavailable(coder.model, f"{coder.model}: {error!r}"))
        finally:
            self._loading.discard((engine, coder))
            self.pump()

    def _waiting_for(self, coder: CoderId) -> list[Pending]:
        return [pending for pending in self.queue if pending.coder == coder]

    async def _run(self, engine: Engine, batch: Batch) -> None:
        """Run a batch on an engine, and make sure that each of its requests is answered or tried again."""
        batch.computed.add_done_callback(lambda _: self.pump())
        watch = self._spawn(self._watch(engine, batch))
        try:
            await engine.run(batch)
            self._note_failed_load(engine, batch)
        except WorkerDied:
            self._retry(batch)
        except Exception as error:  # nothing may escape from a batch: its requests must be answered
            if not isinstance(error, ServerError):
                log.exception("an engine failed while it ran a batch")
            for pending in batch.members:
                pending.fail(error)
        finally:
            watch.cancel()
            self.batches[engine].discard(batch)
            batch.note_computed()

    def _note_failed_load(self, engine: Engine, batch: Batch) -> None:
        """Remember a failed load that happened inside a batch.

        That is possible because a model may be unloaded after its requests were taken from the queue.
        """
        for answer in (pending.answer for pending in batch.members):
            if answer.done() and not answer.cancelled() and isinstance(answer.exception(), ModelUnavailable):
                error = answer.exception()
                assert isinstance(error, ModelUnavailable)
                log.error("%s", error.detail)
                self._note_failure([engine], batch.coder, error)
                return

    async def _watch(self, engine: Engine, batch: Batch) -> None:
        """Kill the engine when a batch makes no progress for `hang_timeout_s`.

        This is the only way to end a GPU kernel or an ffmpeg process that hangs. Work that makes one step after another
        is never killed, however long it takes. A batch that has not started has twice the time, because it waits for
        the batch before it.
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
        """Put the requests of a batch whose worker died back into the queue.

        Requests that the device had begun get a batch of their own.
        """
        was_on_device = batch.started.done() and not batch.computed.done()
        for pending in batch.members:
            pending.deaths += was_on_device
            if self._count_death(pending) and pending.is_wanted:
                pending.is_alone = pending.deaths > 0
                self.queue.put(pending)
        self.pump()

    def _count_death(self, pending: Pending) -> bool:
        """Count an attempt that the death of a worker ended.

        Return whether another attempt is allowed; if not, fail the request.
        """
        pending.tries += 1
        if pending.emitted_bytes:  # another attempt might give other bytes than those that were sent
            pending.fail(WorkerCrashed("the worker process crashed after a part of the answer had been sent"))
        elif pending.deaths < MAX_DEATHS and pending.tries < MAX_TRIES:
            return True
        else:
            pending.fail(WorkerCrashed("the worker process crashed again while it had this request"))
        self.queue.remove(pending)
        return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task and keep a reference to it, because the event loop keeps none."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
