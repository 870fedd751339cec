"""Jobs on Ray: one process has all of them, whichever front a request reaches.

A front passes a request that is to become a job, and every request below /jobs, to the deployment Jobs. That is a front
of its own without HTTP, so that its jobs, their keys and their limits hold for the whole application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import paths
from server.errors import Unavailable
from server.web.failures import as_json
from server.web.jobs import wants_job

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
    """Middleware of a front that passes requests for jobs on."""

    def __init__(self, app: ASGIApp, jobs: DeploymentHandle[Any], max_body_bytes: int) -> None:
        """Wrap an application.

        jobs: the handle of the process with the jobs. max_body_bytes: a request with a larger `Content-Length` is not
            passed on, and the application refuses it.
        """
        self.app = app
        self._jobs = jobs
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not is_for_jobs(scope) or self._is_too_large(scope):
            await self.app(scope, receive, send)
            return
        body = await whole_body(receive)
        if body is None:  # the client has left
            return
        asked = Asked({part: scope.get(part) for part in PASSED_ON}, body)
        try:
            told = await self._jobs.answer.remote(msgspec.msgpack.encode(asked))
        except (RayError, RayServeException):
            await as_json(LOST, Headers(scope=scope).get("x-request-id", ""))(scope, receive, send)
            return
        answer = msgspec.msgpack.decode(told, type=Answered)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _is_too_large(self, scope: Scope) -> bool:
        length = Headers(scope=scope).get("content-length", "")
        return length.isdecimal() and int(length) > self._max_body_bytes


def is_for_jobs(scope: Scope) -> bool:
    """Return whether a request is for a job, or is to become one."""
    is_below = scope["path"].startswith(f"{paths.JOBS}/")
    return is_below or (scope["method"] == "POST" and wants_job(Request(scope)))


async def whole_body(receive: Receive) -> bytes | None:
    """Return the body of a request; None if the client left before it was complete."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


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
