"""The server on Ray Serve: a front that speaks HTTP, and replicas with a device each, fed by Ray's own router.

`serve run deploy.ray_serve:app` runs it on this machine, `serve run deploy/ray_serve.yaml` on GPUs. See ray.md.
"""

# Without `from __future__ import annotations`: Ray reads the builder's argument's class off its annotation.
import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from deploy.ray_devices import Ask, RayDevices, Reply, coder_of, id_of
from deploy.ray_proxy import BehindProxy
from server.config import Settings, load_settings
from server.logs import write_logs
from server.metrics import Metrics
from server.model_info import CoderId
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.engines import Pending
from server.scheduling.service import Service, State
from server.web.app import create_app
from server.workers.process import SPIN_COUNT

if TYPE_CHECKING:  # the front never imports torch
    from server.engine.local import LocalEngine


log = logging.getLogger(__name__)


class Arguments(BaseModel):
    """`args` of the application. models_per_replica: a model's decoder and encoder count as two."""

    config: str | None = None
    models_per_replica: int = 4


def app(arguments: Arguments) -> Application:
    """The application of a models.yaml, by default of the one in the folder, else of the shipped one."""
    load_settings(config=arguments.config)  # what is wrong with them ends the command that deploys
    replicas = VAE.bind(arguments.config, arguments.models_per_replica)  # type: ignore[attr-defined]  # by Ray's decorator
    front: Application = Front.bind(arguments.config, replicas)  # type: ignore[attr-defined]  # likewise
    return front


def settings_of(config: str | None) -> Settings:
    """As this replica's node has them, so that keys never pass through Ray. Raises ConfigError."""
    settings = load_settings(config=config)
    write_logs(settings.options.log_level, settings.options.log_format)
    return settings


# The front's log has a line for each request. A replica that ended is missed within HEALTH_S.
HEALTH_S = 2
ALIKE: dict[str, Any] = {
    "graceful_shutdown_timeout_s": 300,  # as long as a request may take; who has none ends at once
    "health_check_period_s": HEALTH_S,
    "logging_config": LoggingConfig(enable_access_log=False),
}


@serve.deployment(max_ongoing_requests=4, **ALIKE)
class VAE:
    """A device. Of the few requests that Ray hands it, those that are alike run together."""

    async def __init__(self, config: str | None, models_per_replica: int) -> None:  # type: ignore[misc]  # Ray awaits it
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # libgomp reads it as it is loaded
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
                await self._bring(id_of(CoderId(name)))

    async def run(self, message: bytes) -> AsyncIterator[bytes]:
        """An Ask in; Replies out, one as it begins and one with the answer."""
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
            # To its end, whoever leaves: Ray would go on telling of a load that was broken off.
            await asyncio.shield(self._bring(id_of(pending.coder)))
            return self._reply(result=await self._dispatcher.answer(pending))
        except Exception as error:  # noqa: BLE001  # the border of a replica: every waiter is answered
            return self._reply(failure=self._failure_of(error))

    async def describe(self, models: list[str], is_local_only: bool) -> AsyncIterator[bytes]:
        """A Reply for each."""
        for model in models:
            try:
                yield self._reply(info=await self._dispatcher.describe(model, is_local_only=is_local_only))
            except Exception as error:  # noqa: BLE001  # the border of a replica: every waiter is answered
                yield self._reply(failure=self._failure_of(error))

    def _reply(self, **what: Any) -> bytes:
        """Never an exception of Ray's: one of ours would lose its words in it."""
        held = {name: info for name in self._settings.models for info in self._dispatcher.loaded(name)}
        return msgspec.msgpack.encode(Reply(self._name, held, **what))


def multiplexed(engine: "LocalEngine", most: int) -> Callable[[str], Awaitable[str]]:
    """Loads what a replica lacks; Ray knows what each has, and sends requests where their model is.

    What leaves, the engine decides: of as many it holds those used last, and so does Ray's list, about.
    """

    async def bring(model_id: str) -> str:
        await engine.load(coder_of(model_id))
        return model_id

    brought: Callable[[str], Awaitable[str]] = serve.multiplexed(bring, max_num_models_per_replica=most)
    return brought


def end(reason: str) -> None:
    """End this process, which is the only way to end a decode that hangs; Ray starts another."""
    log.critical("this replica is ended: %s", reason)
    logging.shutdown()
    os._exit(1)


@serve.deployment(max_ongoing_requests=1000, max_queued_requests=1000, **ALIKE)
@serve.ingress()
class Front:
    """The contract: parses, admits and answers, as the front process of `python -m server serve` does."""

    def __init__(self, config: str | None, vae: DeploymentHandle[Any]) -> None:
        settings = settings_of(config)
        self._service = Service(settings, RayDevices(vae, list(settings.models)), Metrics())

    def __serve_build_asgi_app__(self) -> Starlette:
        started = asyncio.Event()
        app = create_app(self._service, started.set)
        app.add_middleware(BehindProxy, started=started)
        return app

    def check_health(self) -> None:
        if self._service.state is State.FAILED:
            raise RuntimeError(f"the start failed: {self._service.failure}")
