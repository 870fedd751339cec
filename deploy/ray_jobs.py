"""Jobs on Ray: one process has all of them, whichever front a request reaches.

A front passes a request that is to become a job, and every request below /jobs, to the deployment Jobs. That is a front
of its own without HTTP, so that its jobs, their keys and their limits hold for the whole application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import paths
from server.errors import ServerError, Unavailable
from server.scheduling.service import Service
from server.web.failures import failure
from server.web.jobs import wants_job
from server.web.receive import check_declared, declared_length, receive_whole
from server.web.work import peer_of

LOST = Unavailable(
    "the process that has the jobs ended; ask for the job again, and if it is not found, send the request"
)
PASSED_ON = ("method", "path", "query_string", "headers", "client", "server", "scheme", "http_version")


class Asked(msgspec.Struct, frozen=True):
    """A request for the process with the jobs. about: the parts PASSED_ON of its ASGI scope."""

    about: dict[str, Any]
    body: bytes


class Answered(msgspec.Struct, frozen=True):
    """Its complete answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class ToJobs:
    """Middleware of a front that passes requests for jobs on. It is inside all other middleware of the application.

    A body is received within the limits of the front, as for a request that the front answers itself.
    """

    def __init__(self, app: ASGIApp, jobs: DeploymentHandle[Any]) -> None:
        """Wrap an application. jobs: the handle of the process with the jobs."""
        self.app = app
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not is_for_jobs(scope):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            answer = await self._asked(request)
        except ServerError as error:
            await failure(request, error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _asked(self, request: Request) -> Answered:
        """Return what the process with the jobs answers. Raises ServerError."""
        service: Service = request.app.state.service
        # Both processes log the request with the id that this one gave it.
        headers = MutableHeaders(raw=list(request.scope["headers"]))
        headers["X-Request-Id"] = request.state.request_id
        about = {part: request.scope.get(part) for part in PASSED_ON} | {"headers": headers.raw}
        with ExitStack() as counted:
            body = b""
            if request.method == "POST":
                options = service.settings.options
                check_declared(declared_length(request), options.max_body_mb << 20)
                admission = counted.enter_context(service.admitted(peer_of(request)))
                async with service.in_time(admission):
                    body = bytes(await receive_whole(request, admission, options))
            try:
                told = await self._jobs.answer.remote(msgspec.msgpack.encode(Asked(about, body)))
            except (RayError, RayServeException):
                raise LOST from None
        return msgspec.msgpack.decode(told, type=Answered)


def is_for_jobs(scope: Scope) -> bool:
    """Return whether a request is for a job, or is to become one."""
    is_below = scope["path"].startswith(f"{paths.JOBS}/")
    return is_below or (scope["method"] == "POST" and wants_job(Request(scope)))


async def answer(app: ASGIApp, message: bytes) -> bytes:
    """Return the answer of an application, an Answered. message: an Asked."""
    asked = msgspec.msgpack.decode(message, type=Asked)
    address: dict[str, Any] = {part: _pair(asked.about[part]) for part in ("client", "server")}
    headers = [(bytes(name), bytes(value)) for name, value in asked.about["headers"]]
    scope: Scope = {**asked.about, **address, "type": "http", "headers": headers, "root_path": "", "state": {}}
    scope["raw_path"] = scope["path"].encode()
    messages: list[Message] = [{"type": "http.request", "body": asked.body}]
    parts = bytearray()
    started: dict[str, Any] = {}

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # nobody knows here whether the client leaves
        return messages.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            parts.extend(message.get("body", b""))

    await app(scope, receive, send)
    return msgspec.msgpack.encode(Answered(started["status"], started["headers"], bytes(parts)))


def _pair(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
