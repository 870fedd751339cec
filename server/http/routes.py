"""The routes. Each one reads the request with wire/, asks the Service, and writes the answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.config import ROUTE_WORDS, SLOWEST_BYTES_PER_S, ServerOptions
from server.errors import DeadlinePassed, RequestTooSlow, TooLarge
from server.http import wire
from server.http.openapi import DESCRIPTION
from server.listing import listed
from server.service import Admission, Answer, Service
from server.types import ModelInfo, Operation, VAERequest

PIECE_BYTES = 256 << 10


Finish = Callable[[], Awaitable[VAERequest]]
Read = Callable[[Request, Service, Admission], Awaitable[Finish]]
"""Reads a request whole, and returns what remains to be done with its bytes."""

# Of its own: hostile files may take long, and what others do on threads must not wait for them.
FILES = ThreadPoolExecutor(2, thread_name_prefix="inputs")


class Work:
    """A decode or an encode. An ASGI application, because the answer's sending is part of the request's time."""

    def __init__(self, operation: Operation, read: Read) -> None:
        self.__name__ = str(operation)
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        service: Service = request.app.state.service
        is_sending = False
        try:
            async with service.admitted(wire.patience_s(request.headers.get("x-request-timeout"))) as admission:
                finish = await self._read(request, service, admission)
                with service.answering():
                    answer = await _unless_client_left(request, _answer(service, finish, admission))
                    is_sending = True
                    await _respond(answer)(scope, receive, send)
        except DeadlinePassed:
            if is_sending:  # whoever reads so slowly gets no more of it
                raise ClientDisconnect from None
            raise


async def _answer(service: Service, finish: Finish, admission: Admission) -> Answer:
    return await service.answer(await finish(), admission)


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


async def _read_latents(request: Request, service: Service, admission: Admission) -> Finish:
    """POST / and its like, /{model}: headers and query first, so that what they rule out is refused before the body."""
    options = service.settings.options
    defaults = wire.RenderDefaults(options.fps, options.jpeg_quality, options.video_quality)
    accept = ",".join(request.headers.getlist("accept"))
    query = request.query_params.multi_items()
    others = service.infos.values()
    if sent := await _json(request, service, admission, may_be_file=False):
        latents, in_body = sent
        parameters = wire.Parameters(query, in_body)
        prepared = wire.prepare(parameters, accept, await _model(request, service, parameters), defaults, others)
        admission.reserve(prepared.bytes_held)
        return _done(prepared.with_data(latents))
    parameters = wire.Parameters(query)
    prepared = wire.prepare(parameters, accept, await _model(request, service, parameters), defaults, others)
    return _done(prepared.with_data(await _tensor(request, service, admission, prepared)))


def _done(job: VAERequest) -> Finish:
    async def finish() -> VAERequest:
        return job

    return finish


async def _read_pixels(request: Request, service: Service, admission: Admission) -> Finish:
    """POST /encode, /{model}/encode: a tensor when its shape was sent, else the bytes say what they are."""
    options = service.settings.options
    accept = ",".join(request.headers.getlist("accept"))
    query = request.query_params.multi_items()
    data: bytes | bytearray | None = None
    if sent := await _json(request, service, admission, may_be_file=True):
        data, in_body = sent
        parameters = wire.Parameters(query, in_body)
    else:
        parameters = wire.Parameters(query)
    info = await _model(request, service, parameters)
    if parameters.has("shape"):
        prepared = wire.prepare_pixels(parameters, accept, info)
        if data is None:
            data = await _tensor(request, service, admission, prepared)
        admission.reserve(prepared.bytes_held)
        return _done(prepared.with_data(data))
    wire.check_encode(parameters, accept, info)
    if data is None:
        limit = options.max_body_mb << 20
        admission.reserve(_declared(request) or limit)
        data = await _whole(request, limit, options.body_timeout_s)
    file = data

    async def finish() -> VAERequest:
        loop = asyncio.get_running_loop()
        header = await loop.run_in_executor(FILES, wire.header_of, parameters, info, file)
        admission.reserve(wire.file_bytes_held(header, file))
        return await loop.run_in_executor(FILES, wire.read_pixels, parameters, accept, info, file, header)

    return finish


async def _json(
    request: Request, service: Service, admission: Admission, *, may_be_file: bool
) -> tuple[bytes, Mapping[str, Any]] | None:
    """The bytes and the parameters of a JSON body, None for another one."""
    options, headers = service.settings.options, request.headers
    limit = options.max_body_mb << 20
    _check_declared(headers.get("content-length"), limit)
    content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
    if not wire.is_json_body(content_type, encoding, may_be_file=may_be_file):
        return None
    admission.reserve(_declared(request) or limit)
    return await asyncio.to_thread(wire.read_json, await _whole(request, limit, options.body_timeout_s))


async def _tensor(
    request: Request, service: Service, admission: Admission, prepared: wire.Prepared | wire.PreparedPixels
) -> bytearray:
    """The body of a tensor whose size is known."""
    options = service.settings.options
    _check_declared(str(prepared.bytes_needed), options.max_body_mb << 20)
    if declared := _declared(request):
        prepared.check_length(declared)
    admission.reserve(prepared.bytes_held)
    return await _body(request, prepared.bytes_needed, options.body_timeout_s)


async def _model(request: Request, service: Service, parameters: wire.Parameters) -> ModelInfo:
    """The path names the model, else the query, else it is the default."""
    name = service.resolve(request.path_params.get("model") or parameters.text("model"))
    request.state.model = name
    return await service.describe(name)


def _declared(request: Request) -> int | None:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _check_declared(length: str | None, limit: int) -> None:
    if length and length.isdecimal() and int(length) > limit:
        raise _body_too_large(limit)


def _body_too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes this server reads; send less or smaller ones")


async def _whole(request: Request, limit: int, grace_s: float) -> bytearray:
    """A body whose size nobody said. Raises TooLarge."""
    body = await _body(request, limit, grace_s)
    if len(body) > limit:
        raise _body_too_large(limit)
    return body


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
    stages = ("queue", answer.queue_ms), (answer.operation, answer.device_ms), ("render", answer.render_ms)
    timing = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in stages)
    rendered = answer.rendered
    headers = {**rendered.headers, "Server-Timing": timing}
    if answer.is_upcast:
        headers["X-VAE-Upcast"] = "float32"
    response = InPieces(rendered.body, headers=headers)
    # Set after the fact: Starlette would add a charset to text/plain, which here is a video.
    response.headers["content-type"] = rendered.media_type
    return response


decode = Work(Operation.DECODE, _read_latents)
encode = Work(Operation.ENCODE, _read_pixels)


async def health(request: Request) -> Response:
    """GET /health, /ping: readiness."""
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
    Route("/ping", health),
    Route("/metrics", prometheus),
    Route("/models", models),
    Route("/openapi.json", openapi),
    Route("/", root, methods=["GET"]),
    Route("/", decode, methods=["POST"]),
    Route("/predict", decode, methods=["POST"]),
    Route("/invocations", decode, methods=["POST"]),
    Route("/encode", encode, methods=["POST"]),
    Route("/{model:model}", decode, methods=["POST"]),
    Route("/{model:model}/encode", encode, methods=["POST"]),
]


def all_routes(options: ServerOptions) -> list[Route]:
    """These, and those that the options name, which come first."""
    named = []
    if options.health_route:
        named.append(Route(options.health_route, health))
    if options.predict_route:
        named.append(Route(options.predict_route, decode, methods=["POST"]))
    return [*named, *routes]
