"""The sole owner of what the server is doing: state, models, queue, counts. Knows no HTTP and no torch."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from server.config import Settings
from server.dispatch import Devices, Job
from server.errors import Broken, ConfigError, DeadlinePassed, ModelUnavailable, QueueFull, Unavailable, UnknownModel
from server.metrics import Metrics
from server.types import Done, Half, LoadedInfo, ModelInfo, Operation, Rendered, VAERequest

log = logging.getLogger(__name__)

FIRST_GUESS_S_PER_PIXEL = 1e-6
SMALL_PIXELS = 256 * 256  # below, a decode costs what it costs at any size
MEMORY = 0.3  # of the last decode in the estimate of the next


class State(StrEnum):
    """STARTING -> READY -> DRAINING, or FAILED when a device or a model that must be there at the start is not."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """A rendered picture, or latents, and where its time went."""

    rendered: Rendered
    operation: Operation
    queue_ms: float
    device_ms: float
    render_ms: float
    is_upcast: bool


class Admission:
    """A request's place among the accepted ones, from before its body is read until its answer is sent."""

    def __init__(self, service: Service, deadline: float) -> None:
        self.deadline = deadline
        self.size_bytes = 0
        self._service = service

    def reserve(self, size_bytes: int) -> None:
        """For the request and its answer, before the body is read. Raises QueueFull."""
        self.size_bytes = 0
        self._service.check_bytes(size_bytes)
        self.size_bytes = size_bytes


class Service:
    """Admits, queues, answers."""

    def __init__(self, settings: Settings, devices: Devices, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.state = State.STARTING
        self.failure: ModelUnavailable | ConfigError | None = None
        self.infos: dict[str, ModelInfo] = {}
        self._devices = devices
        self._failed: dict[Half, float] = {}  # models that did not load, until when that is believed
        self._admissions: set[Admission] = set()
        self._answering = 0  # admitted, and the whole request is here
        self._nothing_to_answer = asyncio.Event()
        self._s_per_pixel: dict[Half, float] = {}
        metrics.watch_queue(lambda: devices.waiting, lambda: devices.running, lambda: self._size_bytes)
        for name in settings.models:
            metrics.model_loaded.labels(name).set_function(partial(self._holders, name))

    async def start(self) -> None:
        """Start the devices and load what must be there; READY, or FAILED with `failure` set."""
        try:
            await self._devices.start()
            for name in self.settings.models:
                await self._describe_what_is_here(name)
            await self.describe(self.settings.default)
            for name, entry in self.settings.models.items():
                if entry.preload or entry.warmup:
                    await self._devices.load(name)
        except (ModelUnavailable, ConfigError) as error:
            self._end_start(error)
        except Exception as error:  # the border of the start: a server that cannot start must say so, not hang
            log.exception("the start failed")
            detail = f"the start failed ({type(error).__name__}); the log above says where"
            self._end_start(ModelUnavailable(self.settings.default, detail))
        else:
            self._end_start(None)

    async def _describe_what_is_here(self, name: str) -> None:
        try:
            self.infos[name] = await self._devices.describe(name, is_local_only=True)
        except ModelUnavailable as error:
            if self.settings.folder_of(name) is not None:  # a hub's may be fetched yet
                log.error("%s", error.detail)

    def _end_start(self, failure: ModelUnavailable | ConfigError | None) -> None:
        if self.state is State.STARTING:  # a signal may have come meanwhile
            self.state, self.failure = (State.FAILED if failure else State.READY), failure

    async def drain(self) -> None:
        """Refuse what comes and wait for what was accepted, no longer than `drain_timeout_s`.

        Requests whose body is still on its way are not waited for.
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
            log.error("%d requests were not done within %g s of draining", self._answering, options.drain_timeout_s)

    async def close(self) -> None:
        await self._devices.close()

    def resolve(self, word: str | None) -> str:
        """The model that a request names, the default when it names none. Raises UnknownModel."""
        if word is None:
            return self.settings.default
        name = self.settings.name_of(word)
        if name is None:
            known = ", ".join(sorted({*self.settings.models, *self._aliases()}))
            raise UnknownModel(f"no such model here; known models: {known}")
        return name

    async def describe(self, name: str) -> ModelInfo:
        """What is known of a model before it is loaded. Raises ModelUnavailable."""
        known = self.infos.get(name)
        if known is None or known.is_assumed:
            with self._noting_failure(Half(name)):
                self.infos[name] = await self._devices.describe(name)
        return self.infos[name]

    def loaded(self, name: str) -> list[LoadedInfo]:
        """On each device that holds it."""
        return self._devices.loaded(name)

    def model_state(self, name: str) -> str:
        """`loaded`, `not loaded` or `failed`."""
        if self.loaded(name):
            return "loaded"
        return "failed" if self._failed.get(Half(name), 0.0) > asyncio.get_running_loop().time() else "not loaded"

    def check_ready(self) -> None:
        """Raises Unavailable unless requests are taken."""
        match self.state:
            case State.STARTING:
                raise Unavailable("the server is still loading its models; try again in a few seconds")
            case State.DRAINING:
                raise Unavailable("the server is shutting down and takes no new requests; try again later")
            case State.FAILED:
                raise Broken("a model that this server needs did not load")
        if not self._devices.is_alive:
            raise Unavailable("the worker of this server's device is restarting; try again in a few seconds")

    def check_can_serve(self) -> None:
        """Raises Unavailable unless requests are taken and there is a model that has not failed to load."""
        self.check_ready()
        if all(self.model_state(name) == "failed" for name in self.settings.models):
            raise Broken("no model of this server loads")

    def check_bytes(self, size_bytes: int) -> None:
        """Raises QueueFull when so much more would be too much; one request alone is never."""
        held = self._size_bytes
        if held and held + size_bytes > self.settings.options.max_queue_mb << 20:
            raise self._queue_full("the accepted requests hold as many bytes as this server allows")

    @asynccontextmanager
    async def admitted(self, patience_s: float | None = None) -> AsyncIterator[Admission]:
        """A place among the accepted requests. One deadline covers all of it, the client's if that is earlier.

        Raises Unavailable, QueueFull, DeadlinePassed.
        """
        self.check_ready()
        self._check_places()
        timeout_s = min(self.settings.options.request_timeout_s, patience_s or math.inf)
        admission = Admission(self, asyncio.get_running_loop().time() + timeout_s)
        self._admissions.add(admission)
        try:
            async with asyncio.timeout_at(admission.deadline):
                yield admission
        except TimeoutError:
            raise DeadlinePassed(
                f"not done after {timeout_s:g} s, the deadline of a request; send less at once, or try later"
            ) from None
        finally:
            self._admissions.discard(admission)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """From when the whole request is here until its answer is sent: what a drain waits for.

        Raises QueueFull: the places may have been taken since the head came. A body on its way takes none, or a few
        clients that send slowly would keep all others out; bytes and time bound those.
        """
        self._check_places()
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self._nothing_to_answer.set()

    def _check_places(self) -> None:
        if self._answering >= self.settings.options.max_queue * self._devices.count:
            raise self._queue_full(f"{self._answering} requests wait already")

    async def answer(self, request: VAERequest, admission: Admission) -> Answer:
        """Queue, decode or encode, render. Raises what the engine raises."""
        job = self._job(request, admission)
        try:
            with self._noting_failure(job.model):
                done = await self._devices.answer(job)
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() < admission.deadline:
                self.metrics.cancelled.labels("queued" if job.started is None else "running").inc()
            raise
        started = job.arrived if job.started is None else job.started
        return self._account(job, done, queue_s=started - job.arrived)

    def _job(self, request: VAERequest, admission: Admission) -> Job:
        work = request.job
        rate = self._s_per_pixel.get(Half(work.model, work.operation), FIRST_GUESS_S_PER_PIXEL)
        seconds = max(work.geometry.pixels, SMALL_PIXELS) * rate
        return Job.of(request, seconds=seconds, deadline=admission.deadline)

    @contextmanager
    def _noting_failure(self, half: Half) -> Iterator[None]:
        try:
            yield
        except ModelUnavailable as error:
            now = asyncio.get_running_loop().time()
            if self._failed.get(half, 0.0) <= now:  # once for each try, not for each client that hears of it
                log.error("%s", error.detail)
                self._failed[half] = now + (error.retry_after_s or 0)
            raise
        self._failed.pop(half, None)

    def _account(self, job: Job, done: Done, queue_s: float) -> Answer:
        metrics, (model, operation) = self.metrics, job.model
        device_s = done.device_ms / 1e3
        latest = device_s / (done.batch_size * max(job.pixels, SMALL_PIXELS))
        usual = self._s_per_pixel.get(job.model, latest)
        self._s_per_pixel[job.model] = (1 - MEMORY) * usual + MEMORY * latest
        metrics.queue_wait_s.observe(queue_s)
        (metrics.encode_s if operation is Operation.ENCODE else metrics.decode_s).labels(model).observe(device_s)
        metrics.render_s.labels(job.request.format).observe(done.render_ms / 1e3)
        metrics.request_bytes.observe(job.request.job.tensor.data.nbytes)
        metrics.response_bytes.observe(done.rendered.body.nbytes)
        (metrics.input_pixels if operation is Operation.ENCODE else metrics.output_pixels).labels(model).inc(job.pixels)
        metrics.batch_size.observe(done.batch_size)
        for step in done.oom_steps:
            metrics.out_of_memory.labels(step).inc()
        if done.is_upcast:
            metrics.nonfinite.labels("output").inc()
        return Answer(done.rendered, operation, queue_s * 1e3, done.device_ms, done.render_ms, done.is_upcast)

    def _queue_full(self, what: str) -> QueueFull:
        wait_s = max(1, math.ceil(self._devices.seconds_ahead))
        return QueueFull(f"{what}; try again in {wait_s} s", wait_s)

    def _holders(self, model: str) -> int:
        return len(self.loaded(model))

    @property
    def _size_bytes(self) -> int:
        return sum(admission.size_bytes for admission in self._admissions)

    def _aliases(self) -> set[str]:
        return {alias for entry in self.settings.models.values() for alias in entry.aliases}
