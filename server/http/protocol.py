"""What uvicorn's HTTP class does not do: bounds on head, connections and slow clients, and refusals in JSON.

The only place that leans on uvicorn's own attributes; tests/http/test_protocol.py lists them to notice an upgrade.
Knows no route. The deadline of a body that a route reads is the route's own, see routes.py.
"""

from __future__ import annotations

import asyncio
import secrets

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.config import REFUSED_SHARE, SLOWEST_BYTES_PER_S, ServerOptions
from server.errors import (
    HeadTooLarge,
    MalformedRequest,
    RequestTooSlow,
    ServerError,
    TooManyConnections,
    UpgradeRefused,
)
from server.http.failures import as_json
from server.metrics import Metrics

HEAD_BYTES = 64 << 10
MAX_PIPELINED = 64
# How long a refused client may go on sending: closing at once would reset the connection under its unread bytes, and
# take the refusal along.
LINGER_S = 2.0
TICK_S = 0.25


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """uvicorn as this server runs it. httptools only: of two lengths h11 takes one, and it never ends a slow head."""
    service = app.state.service

    class Protocol(BoundedProtocol):
        options = service.settings.options
        metrics = service.metrics

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
    )


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Every TICK_S it looks at the clock: a timer for each phase would have to be undone in each."""

    options: ServerOptions
    metrics: Metrics

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        super().connection_made(transport)
        self._is_refused = False
        self._head_bytes = 0  # received since the last head or piece of a body
        self._body_bytes = 0
        self._head_since: float | None = self.loop.time()
        self._body_since: float | None = None
        self._read_by: float | None = None  # when the client must have read what is in the buffer
        self._hang_up_at: float | None = None
        self._tick = self.loop.call_later(TICK_S, self._watch)
        if len(self.connections) > self.options.max_connections:
            self._refuse(TooManyConnections("this server has too many open connections; try again in a few seconds"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._tick.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._head_since is None and self._body_since is None:
            self._head_since = self.loop.time()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_since = self.loop.time()
        self._head_bytes += 1  # it has begun, though its first bytes may have come along with the request before
        self._read_by = None

    def on_headers_complete(self) -> None:
        # What is raised here ends the parser; uvicorn then calls send_400_response.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            raise self._refuse(_head_too_large())
        if self.parser.should_upgrade():
            # uvicorn would take the request without its body, and the body for the next request.
            raise self._refuse(
                UpgradeRefused("this server speaks plain HTTP/1.1; send the request without Upgrade, and not CONNECT")
            )
        if len(self.pipeline) >= MAX_PIPELINED:
            # uvicorn reads on after each answer, however many requests wait: a flood of them would fill the memory.
            raise self._refuse(MalformedRequest("too many requests at once on one connection; wait for their answers"))
        super().on_headers_complete()
        self._head_bytes = self._body_bytes = 0
        self._head_since, self._body_since = None, self.loop.time()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0
        self._body_bytes += len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._body_since = None
        if self.cycle.response_complete:  # answered before its body's end: uvicorn's keep-alive timer is gone by now
            self._head_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Where uvicorn goes with every head it cannot use."""
        self._refuse(
            MalformedRequest("this is not an HTTP/1.1 request that can be read; check its head and its framing")
        )

    def _refuse(self, error: ServerError) -> ServerError:
        """Answer what never becomes a request, and end the connection."""
        if self._is_refused:
            return error
        self._is_refused = True
        self._head_since = self._body_since = None
        if self._owes_answer() and (self.pipeline or self.cycle.response_started or not self.cycle.more_body):
            self.cycle.keep_alive = False  # a good request went before: it is answered, and then the connection ends
            return error
        if self._owes_answer():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = as_json(error, secrets.token_hex(8))
        response.headers["Connection"] = "close"
        self.metrics.rejected.labels(error.code).inc()
        self.transport.write(_serialised(response))
        self.transport.write_eof()
        self._hang_up_at = self.loop.time() + LINGER_S
        most = self.options.max_connections
        if len(self.connections) > most + most // REFUSED_SHARE:
            self.transport.close()  # there may be no file left for the next connection, which is to be answered too
        return error

    def _owes_answer(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        now = self.loop.time()
        self._tick = self.loop.call_later(TICK_S, self._watch)
        if self._is_overdue(now):
            self.transport.abort()
        elif self._head_since is not None:
            self._watch_head(now, self._head_since)

    def _is_overdue(self, now: float) -> bool:
        is_left = self._hang_up_at is not None and now > self._hang_up_at
        return is_left or self._is_answer_unread(now) or self._is_body_too_slow_after_its_answer(now)

    def _is_answer_unread(self, now: float) -> bool:
        """Also after a close(), which waits without end for the client to take what is in the buffer."""
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._read_by = None
        elif self._read_by is None:
            self._read_by = now + self.options.send_timeout_s + unread / SLOWEST_BYTES_PER_S
        return self._read_by is not None and now > self._read_by

    def _is_body_too_slow_after_its_answer(self, now: float) -> bool:
        """A body that was refused unread, with 413 say, is read and dropped, so that its sender gets to the answer."""
        if self._body_since is None or self._owes_answer():
            return False
        return now > self._body_since + self.options.body_timeout_s + self._body_bytes / SLOWEST_BYTES_PER_S

    def _watch_head(self, now: float, since: float) -> None:
        if self._owes_answer():
            self._head_since = now  # uvicorn does not read on while a pipelined request waits
        elif now > since + self.options.head_timeout_s and self._head_bytes:
            self._refuse(RequestTooSlow("the request's head did not come in time; send it at once"))
        elif now > since + self.options.head_timeout_s:
            self.transport.close()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's head is larger than {HEAD_BYTES} bytes; send the tensor in the body")


def _serialised(response: Response) -> bytes:
    lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
    return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])
