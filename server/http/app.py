"""The Starlette application for one Service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from server.errors import ServerError
from server.http.auth import RequireKey
from server.http.failures import on_http_exception, on_server_error
from server.http.frame import Frame
from server.http.hosts import CheckHost
from server.http.origins import CheckOrigin, ExposeAnswers
from server.http.routes import BodyThreads, all_routes
from server.http.tracing import tracing
from server.service import Service, State


def create_app(service: Service, on_started: Callable[[], None] | None = None) -> Starlette:
    """The whole server. `on_started` is called once the service is READY or FAILED; until then /health is 503."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        if on_started:
            starting.add_done_callback(lambda _: on_started())
        try:
            yield
        finally:
            service.state = State.DRAINING
            starting.cancel()
            await service.close()

    app = Starlette(
        routes=all_routes(service.settings.options),
        middleware=[
            *tracing(),
            Middleware(ExposeAnswers, options=service.settings.options),
            Middleware(Frame),
            Middleware(CheckHost, options=service.settings.options),
            Middleware(CheckOrigin, options=service.settings.options),
            Middleware(RequireKey, keys=service.settings.api_keys, options=service.settings.options),
        ],
        exception_handlers={ServerError: on_server_error, HTTPException: on_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.body_threads = BodyThreads()
    return app
