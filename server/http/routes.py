"""The routes. Each one reads the request with wire.py, asks the Service, and writes the answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from dataclasses import asdict
from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.config import ROUTE_WORDS, SLOWEST_BYTES_PER_S
from server.errors import DeadlinePassed, NotSupportedYet, RequestTooSlow, TooLarge
from server.http import wire
from server.http.openapi import DESCRIPTION
from server.outputs import FORMATS
from server.service import Admission, Answer, Service
from server.types import ModelInfo, VAERequest

PIECE_BYTES = 256 << 10


class Decode:
    """POST /, /predict, /{model}. An ASGI application, because the answer's sending is part of the request's time."""

    __name__ = "decode"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        service: Service = request.app.state.service
        is_sending = False
        try:
            async with service.admitted(wire.patience_s(request.headers.get("x-request-timeout"))) as admission:
                job = await _read(request, service, admission)
                with service.answering():
                    answer = await _unless_client_left(request, service.decode(job, admission))
                    is_sending = True
                    await _respond(answer)(scope, receive, send)
        except DeadlinePassed:
            if is_sending:  # whoever reads so slowly gets no more of it
                raise ClientDisconnect from None
            raise


decode = Decode()


async def _unless_client_left(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The work's result; a client that leaves takes its request along. Raises ClientDisconnect."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()


async def _read(request: Request, service: Service, admission: Admission) -> VAERequest:
    """Headers and query first, so that what they rule out is refused before the body is read."""
    options = service.settings.options
    defaults = wire.RenderDefaults(options.fps, options.jpeg_quality, options.video_quality)
    headers = request.headers
    accept = ",".join(headers.getlist("accept"))
    limit = options.max_body_mb << 20
    query = request.query_params.multi_items()
    _check_declared(headers.get("content-length"), limit)
    declared = headers.get("content-length", "")
    if wire.is_json_body(headers.get("content-type"), headers.get("content-encoding")):
        admission.reserve(int(declared) if declared.isdecimal() else limit)
        body = await _body(request, limit, options.body_timeout_s)
        if len(body) > limit:
            raise _body_too_large(limit)
        data, sent = await asyncio.to_thread(wire.read_json, body)
        parameters = wire.Parameters(query, sent)
        info = await _model(request, service, parameters)
        prepared = wire.prepare(parameters, accept, info, defaults)
        admission.reserve(prepared.bytes_held)
        return prepared.with_data(data)
    parameters = wire.Parameters(query)
    info = await _model(request, service, parameters)
    prepared = wire.prepare(parameters, accept, info, defaults)
    _check_declared(str(prepared.bytes_needed), limit)
    if declared.isdecimal():
        prepared.check_length(int(declared))
    admission.reserve(prepared.bytes_held)
    return prepared.with_data(await _body(request, prepared.bytes_needed, options.body_timeout_s))


async def _model(request: Request, service: Service, parameters: wire.Parameters) -> ModelInfo:
    """The path names the model, else the query, else it is the default."""
    name = service.resolve(request.path_params.get("model") or parameters.text("model"))
    request.state.model = name
    return await service.describe(name)


def _check_declared(length: str | None, limit: int) -> None:
    if length and length.isdecimal() and int(length) > limit:
        raise _body_too_large(limit)


def _body_too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes this server reads; send fewer or smaller latents")


async def _body(request: Request, limit: int, grace_s: float) -> bytearray:
    """The body, read no further than one chunk past `limit` bytes.

    Raises RequestTooSlow, later the more has come: the sum bounds the time, and the rate refuses a byte at a time.
    """
    body, started = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started + grace_s) as deadline:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
                deadline.reschedule(started + grace_s + len(body) / SLOWEST_BYTES_PER_S)
    except TimeoutError:
        raise RequestTooSlow(f"{len(body)} bytes of the body came in time; send it faster") from None
    return body


class InPieces(Response):
    """uvicorn waits for the client before a piece and not after: in one piece, an answer counts as sent at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _respond(answer: Answer) -> Response:
    timing = f"queue;dur={answer.queue_ms:.1f}, decode;dur={answer.device_ms:.1f}, render;dur={answer.render_ms:.1f}"
    rendered = answer.rendered
    headers = {**rendered.headers, "Server-Timing": timing}
    if answer.is_upcast:
        headers["X-VAE-Upcast"] = "float32"
    response = InPieces(rendered.body, headers=headers)
    # Set after the fact: Starlette would add a charset to text/plain, which here is a video.
    response.headers["content-type"] = rendered.media_type
    return response


async def encode(request: Request) -> Response:
    """POST /encode, /{model}/encode."""
    service: Service = request.app.state.service
    service.resolve(request.path_params.get("model"))
    raise NotSupportedYet("this version decodes only; encode with the VAE's own vae.encode for the time being")


async def health(request: Request) -> Response:
    """GET /health: readiness."""
    service: Service = request.app.state.service
    service.check_can_serve()
    return JSONResponse({"status": service.state})


async def live(request: Request) -> Response:
    """GET /health/live: the process turns."""
    return JSONResponse({"status": "alive"})


async def prometheus(request: Request) -> Response:
    """GET /metrics."""
    service: Service = request.app.state.service
    return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


async def models(request: Request) -> Response:
    """GET /models."""
    service: Service = request.app.state.service
    listed = [_listed(service, name) for name in service.settings.models]
    return JSONResponse({"default": service.settings.default, "models": listed})


def _listed(service: Service, name: str) -> dict[str, Any]:
    entry = service.settings.models[name]
    known: dict[str, Any] = {
        "name": name,
        "repo": entry.repo if service.settings.folder_of(name) is None else "a local folder",
        "subfolder": entry.subfolder,
        "revision": entry.revision,
        "aliases": list(entry.aliases),
        "limits": entry.limits.model_dump(),
        "dtypes": list(wire.LATENT_DTYPES),
    }
    info, loaded = service.infos.get(name), service.loaded(name)
    if info:
        known |= {"latents": asdict(info.latents), "outputs": _outputs(info.latents.kind)}
    if loaded:
        known |= {**asdict(loaded[0]), "device": ", ".join(device.device for device in loaded)}
    return known | {"state": service.model_state(name)}


def _outputs(kind: str) -> list[str]:
    return [media_type for entry in FORMATS if kind in entry.kinds for media_type in entry.media_types]


async def root(request: Request) -> Response:
    """GET /: `Ok` for probes, the page for a browser."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(str(resources.files("server.http") / "page.html"), media_type="text/html")
    return PlainTextResponse("Ok")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(DESCRIPTION)


class ModelName(StringConvertor):
    """A path segment that is not one of the server's own words, so that POST /health is a 405 and not a lost model."""

    regex = rf"(?!(?:{'|'.join(map(re.escape, sorted(ROUTE_WORDS)))})(?:/|$))[^/]+"


register_url_convertor("model", ModelName())

routes = [
    Route("/health", health),
    Route("/health/live", live),
    Route("/metrics", prometheus),
    Route("/models", models),
    Route("/openapi.json", openapi),
    Route("/", root, methods=["GET"]),
    Route("/", decode, methods=["POST"]),
    Route("/predict", decode, methods=["POST"]),
    Route("/encode", encode, methods=["POST"]),
    Route("/{model:model}", decode, methods=["POST"]),
    Route("/{model:model}/encode", encode, methods=["POST"]),
]
