"""The routes. Each one reads the request with wire/, asks the Service, and writes the answer."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.admission import Admission
from server.config import ROUTE_WORDS, SLOWEST_BYTES_PER_S, ServerOptions
from server.errors import BadRequest, QueueFull, RequestTooSlow, TooLarge
from server.http import wire
from server.http.openapi import DESCRIPTION
from server.inputs import VIDEO_TYPE, media_type_of
from server.listing import listed
from server.service import Answer, Service
from server.types import ModelInfo, Operation, VAERequest

PIECE_BYTES = 256 << 10
MOST_PARAMETERS = 256  # in a query: reading thousands of them would stop the event loop

T = TypeVar("T")


Finish = Callable[[], Awaitable[VAERequest]]
Read = Callable[[Request, Service, Admission], Awaitable[Finish]]
"""Reads a request whole, and returns what remains to be done with its bytes."""


class Threads:
    """Threads for work on request bodies. A body waits outside of them, so that a client that leaves takes it along.

    Work that has begun cannot be stopped: its bytes stay counted until it ends.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free = asyncio.Semaphore(count)

    async def run(self, service: Service, admission: Admission, work: Callable[..., T], *arguments: Any) -> T:
        await self._free.acquire()
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        future.add_done_callback(lambda _: self._free.release())
        service.keep_until(future, admission)
        return await asyncio.shield(future)


class BodyThreads:
    """One set for each kind of body, so that cheap work never waits for expensive work."""

    def __init__(self) -> None:
        self.json = Threads(2, "json")
        self.images = Threads(2, "images")
        self.videos = Threads(1, "videos")


class Work:
    """A decode or an encode. An ASGI application, because a request's memory is held until its answer is sent."""

    def __init__(self, operation: Operation, read: Read) -> None:
        self.__name__ = str(operation)
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        service: Service = request.app.state.service
        if scope["query_string"].count(b"&") > MOST_PARAMETERS:
            raise BadRequest(f"the query has more than {MOST_PARAMETERS} parameters; send fewer")
        _note_model(request, service)
        patience_s = wire.patience_s(request.headers.get("x-request-timeout"))
        with service.admitted(peer_of(request), patience_s) as admission, ExitStack() as until_sent:
            async with service.in_time(admission):
                finish = await self._read(request, service, admission)
                until_sent.enter_context(service.answering())
                with service.place(admission):
                    answer = await _unless_client_left(request, _answer(service, finish, admission))
            admission.send(answer.rendered.body.nbytes)
            _note_answer(request, answer)
            await _send(request, _respond(answer), send)


async def _answer(service: Service, finish: Finish, admission: Admission) -> Answer:
    return await service.answer(await finish(), admission)


async def _unless_client_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the work's result; cancel it when the client leaves. Raises ClientDisconnect."""

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


async def _send(request: Request, response: Response, send: Send) -> None:
    """Send all of an answer. Raises ClientDisconnect when the connection ends before, which uvicorn does not tell."""
    is_sent = False

    async def write() -> None:
        nonlocal is_sent
        await response(request.scope, request.receive, send)
        is_sent = True

    async def ended() -> bool:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return not is_sent

    writing, watching = asyncio.create_task(write()), asyncio.create_task(ended())
    try:
        await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and watching.result():
            raise ClientDisconnect
        await writing
    finally:
        writing.cancel()
        watching.cancel()


def peer_of(request: Request) -> str:
    """The address that a request came from; of an IPv6 address the network, because one host has all of it."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _note_model(request: Request, service: Service) -> None:
    """Name the model for the log and the metrics before anything is refused, where path or query name it."""
    word = request.path_params.get("model") or request.query_params.get("model")
    request.state.model = (service.settings.name_of(word) if word else service.settings.default) or "none"


def _note_answer(request: Request, answer: Answer) -> None:
    """Keep for the log line what the answer took."""
    request.state.queue_ms = round(answer.queue_ms)
    request.state.size = answer.size


async def _read_latents(request: Request, service: Service, admission: Admission) -> Finish:
    """POST / and its like, /{model}: a decode, unless only an encode makes sense of what was sent."""
    return await _read(request, service, admission, Operation.DECODE)


async def _read_pixels(request: Request, service: Service, admission: Admission) -> Finish:
    """POST /encode, /{model}/encode."""
    return await _read(request, service, admission, Operation.ENCODE)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request once its model is known. body: None for a tensor whose bytes are still to be read."""

    request: Request
    service: Service
    admission: Admission
    parameters: wire.Parameters
    accept: str
    info: ModelInfo
    body: wire.Bytes | None


async def _read(request: Request, service: Service, admission: Admission, operation: Operation) -> Finish:
    """Headers and query first, so that what they rule out is refused before the body is read.

    A body without `shape` is a file: its bytes say what it is.
    """
    is_encode, query = operation is Operation.ENCODE, request.query_params.multi_items()
    accept = ",".join(request.headers.getlist("accept"))
    is_tensor = wire.Parameters(query).has("shape")
    in_json = await _json(request, service, admission, may_be_file=is_encode or not is_tensor)
    body: wire.Bytes | None
    body, in_body = in_json or (None, None)
    parameters = wire.Parameters(query, in_body)
    info = await _model(request, service, parameters)
    if not parameters.has("shape"):
        if is_encode:
            service.check_loads(info.name, operation)
            wire.check_encode(parameters, accept, info)
        file = in_json[0] if in_json else await _file(request, service, admission)
        parameters, body = wire.opened(parameters, file)
    sent = Sent(request, service, admission, parameters, accept, info, body)
    if not is_encode and not wire.is_for_encoding(parameters, info, body):
        return await _decode(sent)
    return await _encode_tensor(sent) if parameters.has("shape") else _encode_file(sent)


async def _decode(sent: Sent) -> Finish:
    sent.service.check_loads(sent.info.name, Operation.DECODE)
    options = sent.service.settings.options
    if not sent.parameters.has("shape"):  # nor a file that is read: then its type may be the mistake
        wire.is_json_body(sent.request.headers.get("content-type"), None)
    fps = sent.service.settings.fps_of(sent.info.name)
    defaults = wire.RenderDefaults(fps, options.jpeg_quality, options.video_quality)
    prepared = wire.prepare(sent.parameters, sent.accept, sent.info, defaults, sent.service.infos.values())
    return await _whole_tensor(sent, prepared)


async def _encode_tensor(sent: Sent) -> Finish:
    sent.service.check_loads(sent.info.name, Operation.ENCODE)
    return await _whole_tensor(sent, wire.prepare_pixels(sent.parameters, sent.accept, sent.info))


async def _whole_tensor(sent: Sent, prepared: wire.Prepared | wire.PreparedPixels) -> Finish:
    """Read what is still to be read."""
    body = sent.body
    if body is None:
        body = await _tensor(sent.request, sent.service, sent.admission, prepared)
    else:
        sent.admission.reserve(prepared.bytes_held)
    job = prepared.with_data(body)

    async def finish() -> VAERequest:
        return job

    return finish


def _encode_file(sent: Sent) -> Finish:
    parameters, accept, info, file = sent.parameters, sent.accept, sent.info, sent.body
    assert isinstance(file, bytes | bytearray)
    sent.service.check_loads(info.name, Operation.ENCODE)
    wire.check_encode(parameters, accept, info)
    bodies: BodyThreads = sent.request.app.state.body_threads
    threads = bodies.videos if media_type_of(file) == VIDEO_TYPE else bodies.images
    on_thread = partial(threads.run, sent.service, sent.admission)

    async def finish() -> VAERequest:
        header = await on_thread(wire.header_of, parameters, info, file)
        sent.admission.reserve(wire.file_bytes_held(header, file))
        return await on_thread(wire.read_pixels, parameters, accept, info, file, header)

    return finish


async def _file(request: Request, service: Service, admission: Admission) -> bytearray:
    """Receive a body that says itself what it is."""
    options = service.settings.options
    service.check_room(_declared(request) or 0)
    body = await _whole(request, admission, options.max_body_mb << 20, options.body_timeout_s)
    admission.reserve(len(body))
    return body


async def _json(
    request: Request, service: Service, admission: Admission, *, may_be_file: bool
) -> tuple[bytes | bytearray, Mapping[str, Any]] | None:
    """Return the bytes and the parameters of a JSON body, None for another one."""
    options, headers = service.settings.options, request.headers
    limit = options.max_body_mb << 20
    _check_declared(headers.get("content-length"), limit)
    content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
    if not wire.is_json_body(content_type, encoding, may_be_file=may_be_file):
        return None
    service.check_room(_declared(request) or 0)
    body = await _whole(request, admission, limit, options.body_timeout_s)
    admission.reserve(2 * len(body))  # the text, and the bytes that it stands for
    threads: Threads = request.app.state.body_threads.json
    return await threads.run(service, admission, wire.read_json, body)


async def _tensor(
    request: Request, service: Service, admission: Admission, prepared: wire.Prepared | wire.PreparedPixels
) -> bytearray:
    """The body of a tensor whose size is known."""
    options = service.settings.options
    _check_declared(str(prepared.bytes_needed), options.max_body_mb << 20)
    if declared := _declared(request):
        prepared.check_length(declared)
    service.check_room(prepared.bytes_held)
    body = await _body(request, admission, prepared.bytes_needed, options.body_timeout_s)
    admission.reserve(prepared.bytes_held)
    return body


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
    return TooLarge(f"the body is larger than the {limit} bytes that this server accepts; send less data")


async def _whole(request: Request, admission: Admission, limit: int, grace_s: float) -> bytearray:
    """Receive a body whose size is not known. Raises TooLarge, QueueFull, RequestTooSlow."""
    body = await _body(request, admission, limit, grace_s)
    if len(body) > limit:
        raise _body_too_large(limit)
    return body


async def _body(request: Request, admission: Admission, limit: int, grace_s: float) -> bytearray:
    """Receive the body, no further than one chunk past `limit` bytes.

    Raises RequestTooSlow after `grace_s` plus one second per 64 KiB received, so that a slow trickle cannot hold the
    connection open, and QueueFull when the memory is wanted by faster clients.
    """
    body, started = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started + grace_s) as deadline:

            def give_up() -> None:
                if not deadline.expired():
                    deadline.reschedule(0)

            with admission.arriving(give_up):
                async for chunk in request.stream():
                    admission.grow(len(chunk))
                    body += chunk
                    if len(body) > limit:
                        break
                    if not admission.is_given_up:
                        deadline.reschedule(started + grace_s + len(body) / SLOWEST_BYTES_PER_S)
    except TimeoutError:
        if admission.is_given_up:
            raise QueueFull("the memory for slow uploads is used up; try again, and send the body faster", 5) from None
        raise RequestTooSlow(
            f"only {len(body)} bytes of the body came in time; send at least 64 KiB a second"
        ) from None
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
    """GET /health, /ping: readiness. 200 while at least one model can serve; those that did not load are listed."""
    service: Service = request.app.state.service
    service.check_can_serve()
    failed = service.failed_models()
    return JSONResponse({"status": service.state, **({"failed_models": failed} if failed else {})})


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
