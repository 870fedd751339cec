"""The routes: their paths, their names, and the small ones that only tell something."""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..config import ServerOptions, paths
from ..listing import listed
from ..model_info import Direction
from ..scheduling.service import Service
from .openapi import DESCRIPTION
from .work import Work

decode, encode = Work(Direction.DECODE), Work(Direction.ENCODE)


async def health(request: Request) -> Response:
    """GET /health, /ping: readiness. 200 while at least one model can serve; models that did not load are listed."""
    service: Service = request.app.state.service
    service.check_can_serve()
    failed = service.failed_models()
    return JSONResponse({"status": service.state, **({"failed_models": failed} if failed else {})})


async def live(request: Request) -> Response:
    """GET /health/live: liveness. 200 while the event loop responds."""
    return JSONResponse({"status": "alive"})


async def prometheus(request: Request) -> Response:
    """GET /metrics."""
    service: Service = request.app.state.service
    return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


async def models(request: Request) -> Response:
    """GET /models."""
    service: Service = request.app.state.service
    known = [_listed(service, name) for name in service.settings.models]
    return JSONResponse({"default": service.settings.default, "models": known})


def _listed(service: Service, name: str) -> dict[str, Any]:
    known, loaded = listed(service.settings, name, service.infos.get(name)), service.loaded(name)
    if loaded:
        known |= {**asdict(loaded[0]), "device": ", ".join(device.device for device in loaded)}
        known["weights"] = {**(known.get("weights") or {}), "is_here": True}
    return known | {"state": service.model_state(name)}


async def root(request: Request) -> Response:
    """GET /: `Ok` for probes, the page for a browser."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(str(resources.files(__package__) / "page.html"), media_type="text/html")
    return PlainTextResponse("Ok")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(DESCRIPTION)


class ModelName(StringConvertor):
    """A path segment that is not reserved, so that POST /health is a 405 and not an unknown model."""

    regex = rf"(?!(?:{'|'.join(map(re.escape, sorted(paths.RESERVED)))})(?:/|$))[^/]+"


register_url_convertor("model", ModelName())


class NamedRoute(Route):
    """A route that leaves its name for the log and the metrics. is_quiet: its log lines have the level debug."""

    def __init__(self, path: str, endpoint: Any, name: str, *, is_quiet: bool = False, method: str = "GET") -> None:
        super().__init__(path, endpoint, name=name, methods=[method])
        self._is_quiet = is_quiet

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] |= {"route": self.name, "is_quiet": self._is_quiet}
        await super().handle(scope, receive, send)


def all_routes(options: ServerOptions) -> list[NamedRoute]:
    """Return all routes. Those that the options name come first."""
    named = []
    if options.health_route:
        named.append(NamedRoute(options.health_route, health, "health", is_quiet=True))
    if options.predict_route:
        named.append(NamedRoute(options.predict_route, decode, "decode", method="POST"))
    return [
        *named,
        *(NamedRoute(path, health, "health", is_quiet=True) for path in paths.HEALTH),
        NamedRoute(paths.LIVE, live, "live", is_quiet=True),
        NamedRoute(paths.METRICS, prometheus, "prometheus", is_quiet=True),
        NamedRoute(paths.MODELS, models, "models"),
        NamedRoute(paths.OPENAPI, openapi, "openapi"),
        NamedRoute("/", root, "root"),
        *(NamedRoute(path, decode, "decode", method="POST") for path in paths.DECODE),
        NamedRoute(paths.ENCODE, encode, "encode", method="POST"),
        NamedRoute("/{model:model}", decode, "decode", method="POST"),
        NamedRoute(f"/{{model:model}}{paths.ENCODE}", encode, "encode", method="POST"),
    ]
