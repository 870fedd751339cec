"""Make the Starlette application of a Service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ..errors import ServerError
from ..scheduling.service import Service, State
from .auth import RequireKey
from .failures import on_http_exception, on_server_error
from .hosts import CheckHost
from .jobs import Jobs
from .origins import CheckOrigin, ExposeAnswers
from .receive import BodyThreads
from .request_scope import RequestScope
from .routes import all_routes
from .tracing import tracing


def create_app(service: Service, on_started: Callable[[], None] | None = None) -> Starlette:
    """Return the application. Its lifespan starts and closes the service.

    on_started: called once the service is READY or FAILED. Until then /health is 503.
    """

    jobs = Jobs(service.settings.options)
    service.metrics.watch_jobs(lambda: len(jobs), lambda: jobs.size_bytes)

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
            jobs.close()
            await service.close()

    app = Starlette(
        routes=all_routes(service.settings.options),
        middleware=[
            *tracing(),
            Middleware(ExposeAnswers, options=service.settings.options),
            Middleware(RequestScope),
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
    app.state.jobs = jobs
    return app
