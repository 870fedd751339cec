"""Sole owner of running state: what is served, what waits, whether the server is ready. Knows no HTTP and no torch."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from server.config import Settings
from server.errors import DeadlinePassed, ModelUnavailable, QueueFull, Unavailable, UnknownModel
from server.metrics import Metrics
from server.outputs import format_named
from server.types import Decoded, DecodeJob, DecodeRequest, LoadedInfo, ModelInfo, Rendered

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Whatever owns the device: this process, a worker process, a Ray replica."""

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read config.json, not the weights; without the network on demand. Raises ModelUnavailable."""
        ...

    async def load(self, model: str) -> None:
        """Bring the weights to the device. Raises ModelUnavailable."""
        ...

    def loaded(self, model: str) -> LoadedInfo | None:
        """None until the weights are on a device."""
        ...

    async def decode(self, job: DecodeJob) -> Decoded:
        """Decode, loading first if it must. Raises ModelUnavailable, NonFiniteInput, TooLargeForDevice."""
        ...

    def close(self) -> None:
        """Let go of threads and the device."""
        ...


class State(StrEnum):
    """STARTING -> READY -> DRAINING, or FAILED when a model that must be there at the start does not load."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """A rendered picture and where its time went."""

    rendered: Rendered
    queue_ms: float
    decode_ms: float
    render_ms: float


class Service:
    """Admits, decodes, renders."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.state = State.STARTING
        self.failure: ModelUnavailable | None = None
        self.infos: dict[str, ModelInfo] = {}
        self._failed: set[str] = set()
        self._accepted = 0
        self._on_device = 0
        self._last_decode_s = 1.0
        self._render_pool = ThreadPoolExecutor(settings.options.render_threads, thread_name_prefix="render")

    async def start(self) -> None:
        """Load what must be there before the first request; READY, or FAILED with `failure` set."""
        try:
            for name in self.settings.models:
                with suppress(ModelUnavailable):
                    self.infos[name] = await self.engine.describe(name, is_local_only=True)
            await self.describe(self.settings.default)
            for name, entry in self.settings.models.items():
                if entry.preload or entry.warmup:
                    await self.engine.load(name)
                    self.metrics.model_loaded.labels(name).set(1)
        except ModelUnavailable as error:
            self.state, self.failure = State.FAILED, error
        except Exception as error:  # the border of the start: a server that cannot start must say so, not hang
            log.exception("the start failed")
            detail = f"the start failed ({type(error).__name__}); the log above says where"
            self.state, self.failure = State.FAILED, ModelUnavailable(self.settings.default, detail)
        else:
            self.state = State.READY

    def drain(self) -> None:
        """Refuse what comes; what was accepted goes on."""
        self.state = State.DRAINING

    def close(self) -> None:
        self._render_pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

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
        if name not in self.infos:
            with self._noting_failure(name):
                self.infos[name] = await self.engine.describe(name)
        return self.infos[name]

    def model_state(self, name: str) -> str:
        """`loaded`, `not loaded` or `failed`."""
        if self.engine.loaded(name):
            return "loaded"
        return "failed" if name in self._failed else "not loaded"

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except ModelUnavailable as error:
            self._failed.add(name)
            log.error("%s", error.detail)
            raise
        self._failed.discard(name)

    def check_ready(self) -> None:
        """Raises Unavailable unless requests are taken."""
        match self.state:
            case State.STARTING:
                raise Unavailable("the server is still loading its models; try again in a few seconds")
            case State.DRAINING:
                raise Unavailable("the server is shutting down and takes no new requests; try again later")
            case State.FAILED:
                raise Unavailable("a model that this server needs did not load; its log says why, tell its operator")

    def check_can_serve(self) -> None:
        """Raises Unavailable unless requests are taken and there is a model that has not failed to load."""
        self.check_ready()
        if self._failed >= self.settings.models.keys():
            raise Unavailable("no model of this server loads; its log says why, tell its operator")

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place among the accepted requests, from before the body is read until the answer is rendered.

        One deadline covers all of it. Raises Unavailable, QueueFull, DeadlinePassed.
        """
        self.check_ready()
        options = self.settings.options
        if self._accepted >= options.max_queue:
            wait_s = max(1, math.ceil(self._accepted * self._last_decode_s))
            raise QueueFull(f"{self._accepted} requests wait already; try again in {wait_s} s", wait_s)
        self._count(accepted=1)
        try:
            async with asyncio.timeout(options.request_timeout_s):
                yield
        except TimeoutError:
            raise DeadlinePassed(
                f"not done after {options.request_timeout_s:g} s, the deadline of a request; "
                "send fewer or smaller latents, or try later"
            ) from None
        finally:
            self._count(accepted=-1)

    async def decode(self, request: DecodeRequest) -> Answer:
        """Queue, decode, render, for a request that was admitted. Raises what the engine and the renderer raise."""
        arrived = time.perf_counter()
        self._count(on_device=1)
        try:
            with self._noting_failure(request.job.model):
                decoded = await self.engine.decode(request.job)
        finally:
            self._count(on_device=-1)
        done = time.perf_counter()
        chosen = format_named(request.format)
        # Tensors must not wait behind an MP4.
        pool = self._render_pool if chosen.is_encoded else None
        rendered = await asyncio.get_running_loop().run_in_executor(pool, chosen.render, decoded.tensor, request.render)
        return self._account(request, rendered, decoded, done - arrived, time.perf_counter() - done)

    def _count(self, accepted: int = 0, on_device: int = 0) -> None:
        self._accepted += accepted
        self._on_device += on_device
        running = min(1, self._on_device)  # the engine decodes one at a time
        self.metrics.running.set(running)
        self.metrics.queue_depth.set(self._accepted - running)

    def _account(
        self, request: DecodeRequest, rendered: Rendered, decoded: Decoded, engine_s: float, render_s: float
    ) -> Answer:
        job, metrics = request.job, self.metrics
        decode_s = decoded.decode_ms / 1e3
        queue_s = max(0.0, engine_s - decode_s)
        self._last_decode_s = decode_s
        metrics.model_loaded.labels(job.model).set(1)
        metrics.queue_wait_s.observe(queue_s)
        metrics.decode_s.labels(job.model).observe(decode_s)
        metrics.render_s.labels(request.format).observe(render_s)
        metrics.request_bytes.observe(len(job.tensor.data))
        metrics.response_bytes.observe(len(rendered.body))
        g = job.geometry
        metrics.output_pixels.labels(job.model).inc(g.batch * g.num_frames * g.height * g.width)
        return Answer(rendered, queue_s * 1e3, decoded.decode_ms, render_s * 1e3)

    def _aliases(self) -> set[str]:
        return {alias for entry in self.settings.models.values() for alias in entry.aliases}
