"""Middleware for Ray's HTTP proxy.

It replaces the proxy's own error answers by the server's JSON, and sends a request again if its front process ended.
The proxy calls `middlewares` if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it when Ray starts.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress

from ray.exceptions import RayError
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import DeadlinePassed, ServerError, Unavailable
from server.web.failures import as_json
from server.web.request_scope import REQUEST_ID

RAYS_OWN = "/-/"  # Ray's own routes: /-/healthz and /-/routes
START_S = 30.0  # how long a request waits for a front to start
# A front restarts within some seconds. There are few tries, because the request may be the reason why fronts end.
TRIES, PAUSE_S = 2, 4.0
KEPT_BYTES = 16 << 20  # the largest body that is kept to be sent again

ENDED = Unavailable("the process that had this request ended; send it again")
NOT_THERE = Unavailable("the server is starting, or has no room for more requests; try again in a few seconds")
TOO_LATE = DeadlinePassed(
    "the request was not done within the time that Ray's proxy allows; send fewer or smaller latents or images"
)


def middlewares() -> list[Middleware]:
    """Return the middleware for every request to a proxy."""
    return [Middleware(AroundProxy)]


class BehindProxy:
    """Middleware of the front. Removes X-Request-Id from answers, because the proxy sends the same id itself."""

    def __init__(self, app: ASGIApp, started: asyncio.Event) -> None:
        """Wrap an application.

        started: set when the front has started. Decodes and encodes wait for it, because a front that replaces one that
            ended gets requests immediately.
        """
        self.app = app
        self._started = started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "POST":
            with suppress(TimeoutError):
                await asyncio.wait_for(self._started.wait(), START_S)

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        left = asyncio.Event()
        answering = asyncio.ensure_future(self.app(scope, leaving(receive, left), send_without))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:  # by Ray, because the client left
            left.set()
            await answering


def leaving(receive: Receive, left: asyncio.Event) -> Receive:
    """Return a `receive` that reports a client that has left with the message "http.disconnect", as uvicorn does.

    Ray instead cancels the work or raises an error. left: set when Ray has cancelled the work.
    """

    async def receive_or_leave() -> Message:
        tasks = asyncio.ensure_future(receive()), asyncio.create_task(left.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if left.is_set() else tasks[0].result()
        except RayError:
            return {"type": "http.disconnect"}
        finally:
            for task in tasks:
                task.cancel()

    return receive_or_leave


class AroundProxy:
    """Middleware of the proxy. Sends a decode or encode again if its front ended before it answered."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the proxy's application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, up to 1 + TRIES times, and answer in JSON if it fails."""
        if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        if not REQUEST_ID.fullmatch(headers.get("x-request-id", "")):
            headers["x-request-id"] = secrets.token_hex(8)
        body, patience, arrived = Body(receive), patience_of(headers), time.monotonic()
        error = await self._failure(dict(scope), body, send)
        for _ in range(TRIES if scope["method"] == "POST" else 0):
            if error is not ENDED or body.is_forgotten:
                break
            await asyncio.sleep(PAUSE_S)
            if patience is not None:
                headers["x-request-timeout"] = f"{max(1e-3, patience - (time.monotonic() - arrived)):.3f}"
            error = await self._failure(dict(scope), body, send)
        if error:
            await as_json(error, headers["x-request-id"])(scope, receive, send)

    async def _failure(self, scope: Scope, body: Body, send: Send) -> ServerError | None:
        """Pass the request on. Return what went wrong; None if an answer was sent or the client has left."""
        error: ServerError | None = ENDED

        async def send_ours(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start":
                error = _error_of(message)
            if error is None:
                await send(message)

        await self.app(scope, body.reader(), send_ours)
        return None if body.is_client_gone else error


class Body:
    """The body of a request, which is kept so that it can be read again, unless it is larger than KEPT_BYTES.

    is_client_gone: the client has left. is_forgotten: the body was too large to keep.
    """

    def __init__(self, receive: Receive) -> None:
        """Keep what `receive` returns."""
        self.is_client_gone = self.is_forgotten = False
        self._bytes = 0
        self._receive = receive
        self._kept: list[Message] = []

    def reader(self) -> Receive:
        """Return a `receive` that begins with the first message."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            if place < len(self._kept):
                place += 1
                return self._kept[place - 1]
            message = await self._receive()
            self._keep(message)
            place = len(self._kept)
            return message

        return receive

    def _keep(self, message: Message) -> None:
        self.is_client_gone = message["type"] == "http.disconnect"
        self._bytes += len(message.get("body", b""))
        if self._bytes > KEPT_BYTES:
            self.is_forgotten = True
            self._kept.clear()
        else:
            self._kept.append(message)


def patience_of(headers: MutableHeaders) -> float | None:
    """Return X-Request-Timeout in seconds; None if it is not a number, which the front refuses."""
    try:
        return float(headers.get("x-request-timeout", ""))
    except ValueError:
        return None


def _error_of(start: Message) -> ServerError | None:
    """Return the error for an answer that the proxy itself made; None for an answer of the front."""
    status, kind = start["status"], MutableHeaders(scope=start).get("content-type", "")
    if status < 400 or kind.startswith("application/json"):
        return None
    if status == 408:
        return TOO_LATE
    return ENDED if status == 500 else NOT_THERE
