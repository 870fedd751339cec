"""Run the whole server inside the app of Hugging Face's inference toolkit.

The toolkit itself cannot serve the HTTP contract: it refuses `tensor/binary`, keeps only the last `shape` of a query,
and decodes one request at a time.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from starlette.applications import Starlette
from starlette.routing import Mount

from ..config import Settings
from ..engine.local import LocalEngine
from ..engine.models import LoadedModels
from ..metrics import Metrics
from ..scheduling.dispatcher import Dispatcher
from ..scheduling.service import Service, State
from ..web.app import create_app

log = logging.getLogger(__name__)

MODULE = "webservice_starlette"


def running_app() -> Starlette | None:
    """Return the toolkit's app while its start-up hook makes the handler on the event loop; None in any other case."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return None
    app = getattr(sys.modules.get(MODULE), "app", None)
    return app if isinstance(app, Starlette) else None


def take_over(app: Starlette, settings: Settings) -> LoadedModels:
    """Replace all routes of the toolkit's app by those of the server, and return the server's models.

    Returns before anything is loaded: /health is 503 until the default model is loaded. If the start fails, the process
    ends, as it does when a start of the toolkit itself fails.
    """
    # There are no worker processes, because their fork server must be started before the event loop and its threads,
    # and because the toolkit imports torch into this process anyway. A replica of an endpoint has one device.
    engine = LocalEngine(as_served(settings))
    service = Service(as_served(settings), Dispatcher([engine], settings.options), Metrics())
    ours = create_app(service, lambda: end_if_failed(service))
    app.router.routes[:] = [Mount("", ours)]
    app.state.vae_server = asyncio.create_task(run(ours))  # a reference, because the event loop keeps none
    return engine.host.models


def as_served(settings: Settings) -> Settings:
    """Return settings in which the default model has `preload`, and the host is every address.

    So the server is ready only when its default model is loaded. The toolkit listens on every address, whatever the
    host is, so the server must not assume that it can only be reached from this machine.
    """
    default = settings.models[settings.default].model_copy(update={"preload": True})
    options = settings.options.model_copy(update={"host": "0.0.0.0"})  # noqa: S104  # the container bounds the access
    return settings.model_copy(update={"models": {**settings.models, settings.default: default}, "options": options})


async def run(ours: Starlette) -> None:
    """Run the lifespan of the server until the event loop ends. By then uvicorn has answered all accepted requests."""
    async with ours.router.lifespan_context(ours):
        await asyncio.Event().wait()


def end_if_failed(service: Service) -> None:
    """End the process if the start of the service failed.

    Otherwise the endpoint would stay in the state "initializing", and nothing would tell its owner to read the log.
    """
    if service.state is State.FAILED:
        log.critical("%s", getattr(service.failure, "detail", service.failure))
        signal.raise_signal(signal.SIGTERM)
