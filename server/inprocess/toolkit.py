"""The whole server inside the app of Hugging Face's inference toolkit, which alone cannot speak the contract.

The toolkit refuses `tensor/binary`, keeps only the last `shape` of a query, and decodes one request at a time.
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
    """The toolkit's app while its start-up hook, on the event loop, makes the handler; None anywhere else."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return None
    app = getattr(sys.modules.get(MODULE), "app", None)
    return app if isinstance(app, Starlette) else None


def take_over(app: Starlette, settings: Settings) -> LoadedModels:
    """Serve every path. Returns the models, for who calls the handler.

    Returns at once: /health is 503 until the default model is loaded. A start that fails ends the process, as the
    toolkit's own does.
    """
    # Not worker processes: their fork server wants to be started before the event loop and its threads are, and torch
    # is in this process anyway, for the toolkit imports it. One device is what an endpoint's replica has.
    engine = LocalEngine(as_served(settings))
    service = Service(as_served(settings), Dispatcher([engine], settings.options), Metrics())
    ours = create_app(service, lambda: end_if_failed(service))
    app.router.routes[:] = [Mount("", ours)]
    app.state.vae_server = asyncio.create_task(run(ours))  # the event loop itself keeps no task alive
    return engine.host.models


def as_served(settings: Settings) -> Settings:
    """Ready means that the default model is loaded; and the toolkit listens on every address, whatever ours is."""
    default = settings.models[settings.default].model_copy(update={"preload": True})
    options = settings.options.model_copy(update={"host": "0.0.0.0"})  # noqa: S104  # whatever reaches the container
    return settings.model_copy(update={"models": {**settings.models, settings.default: default}, "options": options})


async def run(ours: Starlette) -> None:
    """From start to close, which comes with the end of the event loop: by then uvicorn has answered what it took."""
    async with ours.router.lifespan_context(ours):
        await asyncio.Event().wait()


def end_if_failed(service: Service) -> None:
    """An endpoint that says `initializing` for ever would not tell its owner to read the log."""
    if service.state is State.FAILED:
        log.critical("%s", getattr(service.failure, "detail", service.failure))
        signal.raise_signal(signal.SIGTERM)
