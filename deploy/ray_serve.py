"""The server on Ray Serve: fronts that speak HTTP, replicas with one device each, and a process that has the jobs.

Ray's router connects them.

`serve run deploy.ray_serve:app` runs it on this machine, `serve run deploy/ray_serve.yaml` on GPUs. See ray.md.
"""

# There is no `from __future__ import annotations`, because Ray reads the class of the arguments from the annotation.
import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette
from starlette.middleware import Middleware

from deploy.ray_devices import Ask, RayDevices, Reply, coder_of, id_of
from deploy.ray_jobs import ToJobs, answer
from deploy.ray_proxy import START_S, BehindProxy
from server.config import Settings, load_settings
from server.logs import write_logs
from server.metrics import Metrics
from server.model_info import CoderId
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.engines import Pending
from server.scheduling.service import Service, State
from server.web.app import create_app
from server.workers.starting import SPIN_COUNT

if TYPE_CHECKING:  # the front never imports torch
    from server.engine.local import LocalEngine


log = logging.getLogger(__name__)


class Arguments(BaseModel):
    """The `args` of the application.

    config: a models.yaml, or a folder; None as for `serve`.
    models_per_replica: how many decoders and encoders a replica keeps loaded.
    """

    config: str | None = None
    models_per_replica: int = 4


def app(arguments: Arguments) -> Application:
    """Return the application. Raises ConfigError if the configuration is wrong."""
    load_settings(config=arguments.config)  # so that a mistake ends the command that deploys
    replicas = VAE.bind(arguments.config, arguments.models_per_replica)  # type: ignore[attr-defined]  # by Ray's decorator
    jobs = Jobs.bind(arguments.config, replicas)  # type: ignore[attr-defined]  # likewise
    front: Application = Front.bind(arguments.config, replicas, jobs)  # type: ignore[attr-defined]  # likewise
    return front


def settings_of(config: str | None) -> Settings:
    """Read the settings on this node, so that API keys never pass through Ray, and start to log. Raises ConfigError."""
    settings = load_settings(config=config)
    write_logs(settings.options.log_level, settings.options.log_format)
    return settings


HEALTH_S = 2  # Ray notices within this time that a replica has ended
ALIKE: dict[str, Any] = {
    "graceful_shutdown_timeout_s": 300,  # the deadline of a request; a replica without requests ends immediately
    "health_check_period_s": HEALTH_S,
    "logging_config": LoggingConfig(enable_access_log=False),  # the front logs a line for each request itself
}


@serve.deployment(max_ongoing_requests=4, **ALIKE)
class VAE:
    """A replica with one device. Ray gives it a few requests at a time, of which similar ones run in one batch."""

    async def __init__(self, config: str | None, models_per_replica: int) -> None:  # type: ignore[misc]  # Ray awaits it
        """Start the device, and load the models with `preload` or `warmup`. Raises ConfigError, ModelUnavailable."""
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # libgomp reads it when it is loaded
        from server.engine.local import LocalEngine, check_device
        from server.engine.worker import failure_of

        settings = settings_of(config)
        options = settings.options.model_copy(update={"max_loaded": models_per_replica})
        self._settings = settings.model_copy(update={"options": options})
        check_device(self._settings)
        self._failure_of = failure_of
        self._name = serve.get_replica_context().replica_id.unique_id
        engine = LocalEngine(self._settings, on_hang=end)
        self._dispatcher = Dispatcher([engine], options)
        await self._dispatcher.start()
        self._bring = multiplexed(engine, models_per_replica)
        for name, entry in self._settings.models.items():
            if entry.preload or entry.warmup:
                await self._bring(id_of(CoderId(name, engine.host.models.describe(name).usual_direction)))

    async def run(self, message: bytes) -> AsyncIterator[bytes]:
        """Run a request. message: an Ask. Yields a Reply when the device begins it, and one with the result."""
        ask = msgspec.msgpack.decode(message, type=Ask)
        begun = asyncio.Event()
        answer = asyncio.create_task(self._answer(ask.pending(), begun))
        beginning = asyncio.create_task(begun.wait())
        try:
            await asyncio.wait((answer, beginning), return_when=asyncio.FIRST_COMPLETED)
            if begun.is_set():
                yield self._reply()
            yield await answer
        finally:
            answer.cancel()
            beginning.cancel()

    async def _answer(self, pending: Pending, begun: asyncio.Event) -> bytes:
        pending.on_start = begun.set
        try:
            # A load is not cancelled when its client leaves, because Ray would keep reporting the model as loaded.
            await asyncio.shield(self._bring(id_of(pending.coder)))
            return self._reply(result=await self._dispatcher.answer(pending))
        except Exception as error:  # noqa: BLE001  # nothing may escape from a replica: the front needs an answer
            return self._reply(failure=self._failure_of(error))

    async def describe(self, models: list[str], is_local_only: bool) -> AsyncIterator[bytes]:
        """Read the config.json of some models. Yields a Reply for each."""
        for model in models:
            try:
                yield self._reply(info=await self._dispatcher.describe(model, is_local_only=is_local_only))
            except Exception as error:  # noqa: BLE001  # nothing may escape from a replica: the front needs an answer
                yield self._reply(failure=self._failure_of(error))

    def _reply(self, **what: Any) -> bytes:
        """Return a Reply. Errors are sent in it and not raised, because Ray would lose their arguments."""
        held = {name: info for name in self._settings.models for info in self._dispatcher.loaded(name)}
        return msgspec.msgpack.encode(Reply(self._name, held, **what))


def multiplexed(engine: "LocalEngine", most: int) -> Callable[[str], Awaitable[str]]:
    """Return a function that loads a coder by its name for Ray's model multiplexing.

    Through it, Ray learns which coders each replica has, and sends requests to replicas that have theirs. The engine
    decides which coders to unload: it keeps the `most` recently used ones, and so does Ray's list, approximately.
    """

    async def bring(model_id: str) -> str:
        await engine.load(coder_of(model_id))
        return model_id

    brought: Callable[[str], Awaitable[str]] = serve.multiplexed(bring, max_num_models_per_replica=most)
    return brought


def end(reason: str) -> None:
    """End this process, which is the only way to end work that hangs. Ray starts another replica."""
    log.critical("this replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)


def service_of(config: str | None, vae: DeploymentHandle[Any]) -> Service:
    """Return the service of a process that admits requests. vae: the handle of the replicas."""
    settings = settings_of(config)
    return Service(settings, RayDevices(vae, list(settings.models)), Metrics())


def check_start(service: Service) -> None:
    """Raise RuntimeError if the start failed, so that Ray replaces the process."""
    if service.state is State.FAILED:
        raise RuntimeError(f"the start failed: {service.failure}")


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, **ALIKE)
class Jobs:
    """The process with the jobs of all fronts. It admits and answers what they pass on, as a front does."""

    async def __init__(self, config: str | None, vae: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Start the service. vae: the handle of the replicas."""
        self._service, self._started = service_of(config, vae), asyncio.Event()
        self._app = create_app(self._service, self._started.set)
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, message: bytes) -> bytes:
        """Return the answer to a request that a front passes on. See `ray_jobs.answer`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._started.wait(), START_S)
        return await answer(self._app, message)

    def check_health(self) -> None:
        """Raise RuntimeError if the start failed."""
        check_start(self._service)


@serve.deployment(max_ongoing_requests=1000, max_queued_requests=1000, **ALIKE)
@serve.ingress()
class Front:
    """The HTTP side. It parses, admits and answers requests like the front process of `python -m server serve`."""

    def __init__(self, config: str | None, vae: DeploymentHandle[Any], jobs: DeploymentHandle[Any]) -> None:
        """Make the service. vae: the handle of the replicas. jobs: the handle of the process with the jobs."""
        self._service, self._jobs = service_of(config, vae), jobs

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application that Ray serves."""
        started = asyncio.Event()
        app = create_app(self._service, started.set)
        app.user_middleware.append(Middleware(ToJobs, jobs=self._jobs))  # inside, so that keys and hosts are checked
        app.add_middleware(BehindProxy, started=started)
        return app

    def check_health(self) -> None:
        """Raise RuntimeError if the start failed."""
        check_start(self._service)
