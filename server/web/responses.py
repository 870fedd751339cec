"""Send answers so that a client that leaves, or reads slowly, is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..values import Job, RenderedResult

PIECE_BYTES = 256 << 10

T = TypeVar("T")


class InPieces(Response):
    """A response that is sent in pieces.

    uvicorn applies backpressure before each write, not after it. One large write would count as sent immediately.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def response_of(job: Job, result: RenderedResult) -> Response:
    """Return the response for a result, with `Server-Timing` and the headers of its format."""
    stages = ("queue", result.queue_ms), (job.direction, result.device_ms), ("render", result.render_ms)
    timing = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in stages)
    rendered = result.body
    headers = {**rendered.headers, "Server-Timing": timing}
    if result.is_upcast:
        headers["X-VAE-Upcast"] = "float32"
    response = InPieces(rendered.body, headers=headers)
    # Not set by the constructor, because Starlette would add a charset to text/plain, which is a video here.
    response.headers["content-type"] = rendered.media_type
    return response


async def unless_client_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, but cancel it when the client leaves. Raises ClientDisconnect in that case."""

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


async def send_all(request: Request, response: Response, send: Send) -> None:
    """Send a whole response. Raises ClientDisconnect if the connection ends first, which uvicorn does not report."""
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
