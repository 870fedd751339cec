"""All routes, with the endpoints of those that only report something."""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..config import ServerOptions, paths
from ..contract import Parameters
from ..errors import NotFound
from ..listing import KINDS, chosen, listed
from ..model_info import Direction
from ..scheduling.service import Service
from . import jobs
from .openapi import DESCRIPTION
from .work import Work

PAGE = Path(str(resources.files(__package__))) / "page"
EXAMPLES = PAGE.parent.parent / "demo" / "latents"
MEDIA_TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".jpg": "image/jpeg",
    ".svg": "image/svg+xml",
    ".safetensors": "application/octet-stream",
}
PAGE_FILES = {path.name: path for folder in (PAGE, EXAMPLES) for path in folder.iterdir() if path.suffix in MEDIA_TYPES}

decode, encode = Work(Direction.DECODE), Work(Direction.ENCODE)


async def health(request: Request) -> Response:
    """Answer GET /health and /ping with 200 while at least one model can serve, and list models that did not load."""
    service: Service = request.app.state.service
    service.check_can_serve()
    failed = service.failed_models()
    return JSONResponse({"status": service.state, **({"failed_models": failed} if failed else {})})


async def live(request: Request) -> Response:
    """Answer GET /health/live with 200, which shows that the event loop responds."""
    return JSONResponse({"status": "alive"})


async def prometheus(request: Request) -> Response:
    """Answer GET /metrics with the text that Prometheus reads."""
    service: Service = request.app.state.service
    return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


async def models(request: Request) -> Response:
    """Answer GET /models with a description of each model and its state. `kind` and `name` choose some of them."""
    service: Service = request.app.state.service
    sent = Parameters(request.query_params.multi_items())
    names = chosen(service.settings, service.infos, sent.word("kind", KINDS), sent.text("name"))
    known = [_listed(service, name) for name in names]
    needs_key = bool(service.settings.api_keys)
    return JSONResponse({"default": service.settings.default, "needs_key": needs_key, "models": known})


def _listed(service: Service, name: str) -> dict[str, Any]:
    known, loaded = listed(service.settings, name, service.infos.get(name)), service.loaded(name)
    if loaded:
        known |= {**asdict(loaded[0]), "device": ", ".join(device.device for device in loaded)}
        known["weights"] = {**(known.get("weights") or {}), "is_here": True}
    return known | {"state": service.model_state(name)}


async def root(request: Request) -> Response:
    """Answer GET / with `Ok`, or with a page for a browser."""
    if "text/html" in request.headers.get("accept", ""):
        return _page(request, "/", "index.html")
    return PlainTextResponse("Ok")


def _page(request: Request, path: str, file: str) -> Response:
    """Return a page, or a redirect to its path if the path that was sent ends in more slashes.

    A page has relative addresses, which more slashes would make wrong. The redirect is relative too, because a proxy
    may have removed the beginning of the path.

    path: of the page. file: its name in the folder `page`.
    """
    sent = request.scope.get("raw_path", b"").decode("latin-1")  # RequestScope has removed the slashes from `path`
    more = _slashes_after(sent) - _slashes_after(path)
    if more > 0:
        return RedirectResponse("../" * more + path.lstrip("/"))
    return FileResponse(PAGE / file, media_type="text/html")


def _slashes_after(path: str) -> int:
    return len(path) - len(path.rstrip("/"))


async def page_file(request: Request) -> Response:
    """Answer GET /page/{file}: the page's style, script and icon, and the examples that it shows."""
    file = PAGE_FILES.get(request.path_params["file"])
    if file is None:
        raise NotFound("no such file of the page")
    return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers={"Cache-Control": "no-cache"})


async def openapi(request: Request) -> Response:
    """Answer GET /openapi.json with the description of the HTTP contract."""
    return JSONResponse(DESCRIPTION)


async def docs(request: Request) -> Response:
    """Answer GET /docs with a page that shows the description of the HTTP contract."""
    return _page(request, paths.DOCS, "docs.html")


class ModelName(StringConvertor):
    """A path segment that may be a model's name. Reserved words are not, so that POST /health is 405 and not 404."""

    regex = rf"(?!(?:{'|'.join(map(re.escape, sorted(paths.RESERVED)))})(?:/|$))[^/]+"


register_url_convertor("model", ModelName())


class NamedRoute(Route):
    """A route that notes its name for the log and the metrics."""

    def __init__(self, path: str, endpoint: Any, name: str, *, is_quiet: bool = False, method: str = "GET") -> None:
        """Make a route. is_quiet: its requests are logged with the level debug instead of info."""
        super().__init__(path, endpoint, name=name, methods=[method])
        self._is_quiet = is_quiet

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the name of the route, and handle the request."""
        scope["state"] |= {"route": self.name, "is_quiet": self._is_quiet}
        await super().handle(scope, receive, send)


def all_routes(options: ServerOptions) -> list[NamedRoute]:
    """Return all routes, in the order in which they are matched. Routes from the options come first."""
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
        NamedRoute(paths.DOCS, docs, "docs"),
        NamedRoute("/", root, "root"),
        NamedRoute(f"{paths.PAGE}/{{file}}", page_file, "page", is_quiet=True),
        NamedRoute(f"{paths.JOBS}/{{id}}", jobs.show, "job"),
        NamedRoute(f"{paths.JOBS}/{{id}}", jobs.cancel, "job", method="DELETE"),
        NamedRoute(f"{paths.JOBS}/{{id}}/result", jobs.result, "job_result"),
        NamedRoute(f"{paths.REQUESTS}/{{id}}/progress", jobs.progress, "progress"),
        *(NamedRoute(path, decode, "decode", method="POST") for path in paths.DECODE),
        NamedRoute(paths.ENCODE, encode, "encode", method="POST"),
        NamedRoute("/{model:model}", decode, "decode", method="POST"),
        NamedRoute(f"/{{model:model}}{paths.ENCODE}", encode, "encode", method="POST"),
    ]
