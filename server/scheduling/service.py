"""The server without HTTP: its state, what is known of its models, the admission of requests, and their answers.

The queue belongs to the devices (see `engines.Devices`). Knows no HTTP and no torch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any

from ..config import Settings
from ..errors import Broken, ConfigError, DeadlinePassed, ModelUnavailable, QueueFull, Unavailable, UnknownModel
from ..metrics import Metrics
from ..model_info import CoderId, Direction, LoadedInfo, ModelInfo
from ..values import RenderedResult, Request
from .admission import Admission, Admissions
from .engines import Devices, Pending
from .estimates import Estimates
from .progress import Progress, progress_of

log = logging.getLogger(__name__)


class State(StrEnum):
    """The state of the server: STARTING, then READY, then DRAINING.

    FAILED replaces READY if a device, or a model that must be loaded at the start, is not usable.
    """

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """Admits requests, has the devices answer them, and counts both.

    settings: the configuration.
    metrics: the collectors that it updates.
    state: see `State`.
    failure: why the state is FAILED; None otherwise.
    infos: what is known of each model, by name, as far as its config.json has been read.
    """

    def __init__(self, settings: Settings, devices: Devices, metrics: Metrics) -> None:
        """Make a service that has not started. devices: run the requests; `start` starts them."""
        self.settings = settings
        self.metrics = metrics
        self.state = State.STARTING
        self.failure: ModelUnavailable | ConfigError | None = None
        self.infos: dict[str, ModelInfo] = {}
        self._devices = devices
        self._descriptions: dict[str, asyncio.Future[ModelInfo]] = {}  # those that are being read now
        self._watched: dict[str, Pending] = {}  # by the id of the request, while it waits or is computed
        self._answering = 0  # the number of requests that are complete and whose answer has not been sent yet
        self._nothing_to_answer = asyncio.Event()
        options = settings.options
        self._admissions = Admissions(
            options.max_queue_mb << 20, lambda: options.max_queue * self._devices.count, self._queue_full
        )
        self._estimates = Estimates(lambda: asyncio.get_running_loop().time())
        metrics.watch_queue(lambda: devices.waiting, lambda: devices.running, lambda: self._admissions.size_bytes)
        for name in settings.models:
            metrics.model_loaded.labels(name).set_function(partial(self._holders, name))

    async def start(self) -> None:
        """Start the devices, and load the models that must be ready at the start.

        Raises nothing. Afterwards the state is READY, or FAILED with `failure` set.
        """
        try:
            await self._devices.start()
            for name in self.settings.models:
                await self._describe_what_is_here(name)
            await self.describe(self.settings.default)
            for name, entry in self.settings.models.items():
                if entry.preload or entry.warmup:
                    await self._devices.load(CoderId(name, (await self.describe(name)).usual_direction))
        except (ModelUnavailable, ConfigError) as error:
            self._end_start(error)
        except Exception as error:  # nothing may escape: a server that cannot start must say so and not hang
            log.exception("the start failed")
            detail = f"the start failed ({type(error).__name__}); the log above says where"
            self._end_start(ModelUnavailable(self.settings.default, detail))
        else:
            self._end_start(None)

    async def _describe_what_is_here(self, name: str) -> None:
        """Describe a model by the files on this machine. Does nothing if there are none."""
        try:
            self.infos[name] = await self._devices.describe(name, is_local_only=True)
        except ModelUnavailable as error:
            if self.settings.path_of(name) is not None:  # a model of the Hub can still be downloaded
                log.error("%s", error.detail)

    def _end_start(self, failure: ModelUnavailable | ConfigError | None) -> None:
        if self.state is State.STARTING:  # after a signal it is DRAINING already
            self.state, self.failure = (State.FAILED if failure else State.READY), failure

    async def drain(self) -> None:
        """Refuse new requests, and wait until the accepted ones are answered, but at most `drain_timeout_s`.

        It does not wait for requests whose body is still arriving.
        """
        self.state = State.DRAINING
        options = self.settings.options
        with suppress(TimeoutError):
            async with asyncio.timeout(options.drain_timeout_s):
                await asyncio.sleep(options.drain_notice_s)
                while self._answering:
                    self._nothing_to_answer.clear()
                    await self._nothing_to_answer.wait()
        if self._answering:
            log.error(
                "%d requests were not answered within the %g s of --drain-timeout-s",
                self._answering,
                options.drain_timeout_s,
            )

    def end_devices(self) -> None:
        """End all work on the devices at once, because the server must end now."""
        self._devices.kill()

    async def close(self) -> None:
        """Release the devices."""
        await self._devices.close()

    def resolve(self, word: str | None) -> str:
        """Return the name of the model that a request names, or of the default model if it names none.

        word: a name or an alias, in any case; None if the request names none. Raises UnknownModel.
        """
        if word is None:
            return self.settings.default
        name = self.settings.name_of(word)
        if name is None:
            known = ", ".join(sorted({*self.settings.models, *self._aliases()}))
            raise UnknownModel(f"this server has no such model; known models: {known}")
        return name

    async def describe(self, name: str) -> ModelInfo:
        """Return what is known of a model before its weights are loaded. Reads its config.json if that is still unread.

        Raises ModelUnavailable.
        """
        known = self.infos.get(name)
        if known is None or known.is_assumed:
            self.check_loads(name, Direction.DECODE)  # a failed description counts as a failed load of both directions
            asked = self._descriptions.get(name)
            # Simultaneous requests share one attempt, because it takes half a minute if the Hub cannot be reached.
            if asked is None:
                asked = self._descriptions[name] = asyncio.ensure_future(self._devices.describe(name))
                asked.add_done_callback(lambda _: self._descriptions.pop(name, None))
            self.infos[name] = await asyncio.shield(asked)
        return self.infos[name]

    def check_loads(self, name: str, direction: Direction) -> None:
        """Raise ModelUnavailable if this direction of a model failed to load and may not be tried again yet."""
        if failure := self._devices.load_failure(CoderId(name, direction)):
            raise failure

    def loaded(self, name: str) -> list[LoadedInfo]:
        """Return one entry for each device that has the model loaded."""
        return self._devices.loaded(name)

    def model_state(self, name: str) -> str:
        """Return `loaded`, `not loaded`, or `failed` if its decoder failed to load and may not be tried again yet."""
        if self.loaded(name):
            return "loaded"
        return "failed" if self._devices.load_failure(CoderId(name)) else "not loaded"

    def check_ready(self) -> None:
        """Raise Unavailable unless the server accepts requests."""
        match self.state:
            case State.STARTING:
                raise Unavailable("the server is still loading its models; try again in a few seconds")
            case State.DRAINING:
                raise Unavailable("the server is shutting down and takes no new requests; try again later")
            case State.FAILED:
                raise Broken("this server did not start, because a model did not load or a device cannot be used")
        if not self._devices.is_alive:
            raise Unavailable("the workers of this server are restarting; try again in a few seconds")

    def failed_models(self) -> list[str]:
        """Return the names of the models whose decoder or encoder failed to load and may not be tried again yet."""
        failed = (CoderId(name, direction) for name in self.settings.models for direction in Direction)
        return list(dict.fromkeys(coder.model for coder in failed if self._devices.load_failure(coder)))

    def check_can_serve(self) -> None:
        """Raise Unavailable unless the server accepts requests and has a model that did not fail to load."""
        self.check_ready()
        if all(self.model_state(name) == "failed" for name in self.settings.models):
            raise Broken("every model of this server failed to load")

    @contextmanager
    def admitted(self, peer: str, patience_s: float | None = None) -> Iterator[Admission]:
        """Admit a request in a context, which lasts from its head until its answer is sent.

        peer: the address of the client.
        patience_s: the client's own time limit in seconds; None for none. The deadline is the earlier of the client's
            limit and the server's.

        Raises Unavailable, QueueFull.
        """
        self.check_ready()
        self._admissions.check_place(peer)
        timeout_s = min(self.settings.options.request_timeout_s, patience_s or math.inf)
        with self._admissions.admit(peer, asyncio.get_running_loop().time() + timeout_s) as admission:
            yield admission

    def check_room(self, size_bytes: int) -> None:
        """Raise QueueFull if a request of this size would not fit now. Reserves no memory."""
        self._admissions.check_room(size_bytes)

    def keep_until(self, future: asyncio.Future[Any], admission: Admission) -> None:
        """Count a request's bytes until `future` is done, because its thread uses them even if the request ends."""
        self._admissions.keep_until(future, admission)

    @asynccontextmanager
    async def in_time(self, admission: Admission) -> AsyncIterator[None]:
        """Bound the time from the head of a request until its answer is ready. Raises DeadlinePassed.

        The time to send the answer is not included, because it depends on the client. `web.protocol` bounds it.
        """
        try:
            async with asyncio.timeout_at(admission.deadline):
                yield
        except TimeoutError:
            raise DeadlinePassed(
                f"the request was not done after {admission.deadline - admission.began:.3g} s, its deadline; "
                "send fewer or smaller latents or images, or try again later"
            ) from None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a complete request in a context, which lasts until its answer is sent. A drain waits for it."""
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self._nothing_to_answer.set()

    def place(self, admission: Admission) -> AbstractContextManager[None]:
        """Hold one of the places for requests that wait or are computed, in a context. Raises QueueFull."""
        return self._admissions.place(admission.peer)

    async def answer(
        self,
        request: Request,
        admission: Admission,
        on_piece: Callable[[bytes], None] | None = None,
        known_as: Sequence[str] = (),
    ) -> RenderedResult:
        """Queue a request, and return its result once it is decoded or encoded, and rendered.

        on_piece: receives the pieces of a streamed answer, which the result's body then lacks.
        known_as: the ids by which `progress` knows the request.
        Raises what `Devices.answer` raises.
        """
        pending = self._pending(request, admission)
        pending.on_piece = on_piece
        self._watched |= dict.fromkeys(known_as, pending)
        try:
            result = await self._devices.answer(pending)
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() < admission.deadline:
                self.metrics.cancelled.labels("queued" if pending.started is None else "running").inc()
            raise
        finally:
            for each in known_as:
                if self._watched.get(each) is pending:
                    del self._watched[each]
        started = pending.arrived if pending.started is None else pending.started
        result = replace(result, queue_ms=(started - pending.arrived) * 1e3)
        self._note(request, result, pending.emitted_bytes)
        return result

    def progress(self, request_id: str) -> Progress | None:
        """Return how far a request is that waits or is computed; None if there is none with this id."""
        pending = self._watched.get(request_id)
        if pending is None:
            return None
        return progress_of(pending, *self._devices.place_of(pending), asyncio.get_running_loop().time())

    def _pending(self, request: Request, admission: Admission) -> Pending:
        """Return the queue's entry for a request, with the estimates of its time."""
        coder, pixels = request.job.coder, request.job.geometry.pixels
        return Pending.of(
            request,
            seconds=self._estimates.seconds(coder, pixels),
            least_seconds=self._estimates.least_seconds(coder, pixels),
            deadline=admission.deadline,
        )

    def _note(self, request: Request, result: RenderedResult, emitted_bytes: int) -> None:
        """Record a result in the metrics and the estimates. emitted_bytes: what was streamed before."""
        metrics, job = self.metrics, request.job
        pixels, device_s = job.geometry.pixels, result.device_ms / 1e3
        is_encode = job.direction is Direction.ENCODE
        self._estimates.note(job.coder, pixels, device_s / result.batch_size)
        metrics.queue_wait_s.observe(result.queue_ms / 1e3)
        (metrics.encode_s if is_encode else metrics.decode_s).labels(job.model).observe(device_s)
        metrics.render_s.labels(job.format).observe(result.render_ms / 1e3)
        metrics.request_bytes.observe(request.data.nbytes)
        metrics.response_bytes.observe(emitted_bytes + result.body.body.nbytes)
        (metrics.input_pixels if is_encode else metrics.output_pixels).labels(job.model).inc(pixels)
        metrics.batch_size.observe(result.batch_size)
        for step in result.oom_steps:
            metrics.out_of_memory.labels(step).inc()
        if result.is_upcast:
            metrics.nonfinite.labels("output").inc()

    def _queue_full(self, what: str) -> QueueFull:
        """Return the error, with the estimated time until a retry may succeed. what: says what is full."""
        wait_s = max(1, math.ceil(self._devices.seconds_ahead))
        return QueueFull(f"{what}; try again in {wait_s} s", wait_s)

    def _holders(self, model: str) -> int:
        """Return how many devices have the model loaded."""
        return len(self.loaded(model))

    def _aliases(self) -> set[str]:
        return {alias for entry in self.settings.models.values() for alias in entry.aliases}
