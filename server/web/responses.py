"""Send answers so that a client that leaves, or reads slowly, is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ServerError
from ..values import Job, RenderedResult

PIECE_BYTES = 256 << 10

T = TypeVar("T")


class InPieces(Response):
    """A response that is sent in pieces.

    uvicorn applies backpressure before each write, not after it. One large write would count as sent immediately.
    """

    @property
    def size_bytes(self) -> int:
        """The length of the body."""
        return len(self.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def response_of(job: Job, result: RenderedResult) -> InPieces:
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


class BrokenAnswer(Exception):
    """An answer failed after its first piece was sent. error: why.

    The connection ends without the last chunk, so that the client does not take what it has got for the whole.
    """

    def __init__(self, error: ServerError) -> None:
        """Keep the reason."""
        super().__init__(str(error))
        self.error = error


class Streamed(Response):
    """An answer that is sent piece by piece while it is computed.

    Pieces that the client has not read yet wait in memory, which was reserved for the whole answer.

    has_begun: whether a part of it was sent. is_complete: whether all of it was.
    """

    def __init__(self, job: Job, send: Send) -> None:
        """Begin to send what `put` will bring."""
        super().__init__(media_type=job.render.media_type, headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.has_begun = self.is_complete = False
        self._send = send
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._unsent_bytes = 0
        self._sending = asyncio.create_task(self._send_pieces())

    def put(self, piece: bytes) -> None:
        """Take the next piece."""
        self._unsent_bytes += len(piece)
        self._pieces.put_nowait(piece)

    def end(self) -> None:
        """Note that there are no more pieces."""
        self._pieces.put_nowait(None)

    def cancel(self) -> None:
        """Send nothing more, not even that the answer is complete."""
        self._sending.cancel()

    @property
    def size_bytes(self) -> int:
        """The bytes that are not sent yet."""
        return self._unsent_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait until everything is sent."""
        await self._sending

    async def _send_pieces(self) -> None:
        while (piece := await self._pieces.get()) is not None:
            if not self.has_begun:
                self.has_begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            self._unsent_bytes -= len(piece)
        self.is_complete = True  # before the last send, after which uvicorn tells that the connection is free
        await self._send({"type": "http.response.body", "body": b""})


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
        return not (is_sent or (isinstance(response, Streamed) and response.is_complete))

    writing, watching = asyncio.create_task(write()), asyncio.create_task(ended())
    try:
        await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and watching.result():
            raise ClientDisconnect
        await writing
    finally:
        writing.cancel()
        watching.cancel()
