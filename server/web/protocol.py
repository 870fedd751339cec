"""Bound heads, connections and slow clients, and answer malformed requests with a JSON error, as uvicorn does not.

A client on a slow connection is never cut off as long as it makes progress: an average of 64 KiB per second is enough.

This is the only module that uses internal attributes of uvicorn. tests/web/test_protocol.py lists them, to notice when
an upgrade changes them. The module knows no route. A route that reads a body bounds its time itself, see receive.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..config import REFUSED_SHARE, SLOWEST_BYTES_PER_S, ServerOptions, tls_context
from ..errors import HeadTooLarge, MalformedRequest, RequestTooSlow, ServerError, TooManyConnections, UpgradeRefused
from ..metrics import Metrics
from .auth import is_probe
from .connections import TURNS, Tls, close_longest_idle
from .failures import as_json

log = logging.getLogger(__name__)

HEAD_BYTES = 64 << 10  # the largest request line and headers together
MAX_PIPELINED = 64  # the most requests of one connection that wait for their turn
MOST_PIECES = 20_000  # the most chunks in one read, because each costs the event loop some microseconds
OFFER = frozenset({b"upgrade", b"http2-settings"})  # headers that offer a protocol, and their names in Connection
SPARE_HEAD_S = 2.0  # how long a connection over the limit may take to send the head of a health check
# How long a refused client may go on sending. Closing the connection at once would reset it, because of the unread
# bytes, and the client would not get the refusal.
LINGER_S = 2.0
TICK_S = 0.25  # the time between two checks of a connection
# The most credit, in seconds of not reading, that a client can build up by reading faster than 64 KiB per second.
# Without a bound, it could stop reading for hours after a fast start.
MOST_CREDIT_S = 60.0


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """Return the configuration of uvicorn for an application that `create_app` made.

    Only httptools is used: h11 accepts a request with two different lengths, and has no time limit for a slow head.
    """
    service = app.state.service
    options: ServerOptions = service.settings.options
    context = tls_context(options)

    class Http(BoundedProtocol):
        metrics = service.metrics

    Http.options = options

    def protocol(**known: Any) -> BoundedProtocol | Tls:
        """Return the protocol of a new connection."""
        http = Http(**known)
        if context is None:
            return http
        return Tls(
            http,
            http.connections,
            context,
            most=most_connections(options),
            timeout_s=options.head_timeout_s,
            shutdown_timeout_s=options.send_timeout_s + MOST_CREDIT_S,
        )

    return uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
    )


class CountingTransport:
    """A wrapper of a transport that counts the bytes written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        """Wrap a transport. All its other methods work as before."""
        self._transport = transport
        self.write = self._write
        self.written_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self._transport.write(data)

    @property
    def taken_bytes(self) -> int:
        """The number of bytes that have left this process."""
        return self.written_bytes - self._transport.get_write_buffer_size()


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    It checks its time limits every TICK_S. A timer for each phase would have to be cancelled in every other phase.
    """

    options: ServerOptions
    metrics: Metrics
    transport: CountingTransport  # type: ignore[assignment]  # it has all of a transport's methods

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        """Begin to watch a new connection. If there are too many, close an idle one or refuse this one."""
        super().connection_made(CountingTransport(transport))  # type: ignore[arg-type]  # likewise
        self.became_idle = next(TURNS)
        self._head_of_offer = b""
        self._pieces = 0  # the number of pieces of bodies in the last read
        self._running: RequestResponseCycle | None = None  # the request whose answer is being made
        self._is_spare = False  # whether the connection is over the limit, and may only send a health check
        self._is_refused = False
        self._head_bytes = 0  # the number of bytes received since the last head or piece of a body
        self._body_bytes = 0
        self._head_since: float | None = self.loop.time()
        self._body_since: float | None = None
        self._looked_at = self.loop.time()
        self._taken_bytes = 0  # the number of bytes that had left this process at that time
        self._credit_s = self.options.send_timeout_s  # how long the client may stop reading
        self._hang_up_at: float | None = None
        self._tick = self.loop.call_later(TICK_S, self._watch)
        if len(self.connections) > self.options.max_connections:
            self._make_room()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _make_room(self) -> None:
        """Close the connection that has been idle for the longest time.

        If none is idle, serve this connection only if it sends a health check.
        """
        if close_longest_idle(self.connections, self):
            return
        if len(self.connections) <= most_connections(self.options):
            self._is_spare = True
        else:
            self._refuse(_too_many_connections())

    def close(self) -> None:
        """End the connection after what is being sent."""
        self.transport.close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress and the client has read all answers."""
        is_working = self._owes_answer() or self.pipeline or self._body_since is not None
        return not (is_working or self.transport.is_closing() or self.transport.get_write_buffer_size())

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching, and tell the running request that its client has left."""
        self._tick.cancel()
        # uvicorn tells only the last of several pipelined requests, which may not be the running one.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and refuse a head that is too large."""
        if self._is_refused:
            return
        if self._head_since is None and self._body_since is None:
            self._head_since = self.loop.time()
        self._head_bytes += len(data)
        self._pieces = 0
        self._parse(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(_head_too_large())

    def _parse(self, data: bytes) -> None:
        """Do what uvicorn's `data_received` does, but ignore the offer of another protocol in a request."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes all bytes after the head for the other protocol, so a new one parses the head without the
            # offer, and the rest.
            head, self._head_of_offer = self._head_of_offer, b""
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._parse(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin to measure the time of a head."""
        super().on_message_begin()
        self._head_since = self.loop.time()
        self._head_bytes += 1  # not 0: the head has begun, although its bytes may have arrived with the last request

    def on_headers_complete(self) -> None:
        """Refuse a complete head, or start its request.

        An exception ends the parser. uvicorn then calls `send_400_response`, which does nothing after a refusal.
        """
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            raise self._refuse(_head_too_large())
        if self.parser.should_upgrade() and self._is_offer():
            self._head_of_offer = self._head_without_offer()
            return
        if self.parser.should_upgrade():
            raise self._refuse(
                UpgradeRefused(
                    "this server speaks only HTTP/1.1; send the request without Upgrade, and do not use CONNECT"
                )
            )
        if self._is_spare and not self._is_probe():
            raise self._refuse(_too_many_connections())
        if len(self.pipeline) >= MAX_PIPELINED:
            # uvicorn goes on reading after each answer, however many requests wait, so a flood would fill the memory.
            raise self._refuse(MalformedRequest("too many requests at once on one connection; wait for their answers"))
        super().on_headers_complete()
        if self._is_spare:
            self.cycle.keep_alive = False
        self._head_bytes = self._body_bytes = 0
        self._head_since, self._body_since = None, self.loop.time()

    def on_body(self, body: bytes) -> None:
        """Pass a piece of a body on, and refuse a body in too many small chunks."""
        self._pieces += 1
        if self._pieces > MOST_PIECES:
            raise self._refuse(MalformedRequest("the body is sent in chunks of a few bytes; send larger chunks"))
        super().on_body(body)
        self._head_bytes = 0
        self._body_bytes += len(body)

    def _is_offer(self) -> bool:
        """Return whether the Upgrade header may be ignored, as RFC 9110, 7.8 allows.

        Java's client offers h2c with every request. CONNECT and WebSocket cannot be ignored.
        """
        return self.parser.get_method() != b"CONNECT" and self._get_upgrade() not in (None, b"websocket")

    def _head_without_offer(self) -> bytes:
        """Return the head of this request without the headers that offer another protocol."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() not in OFFER]
                lines += [b"connection:" + b",".join(kept)] if kept else []
            elif name not in OFFER:
                lines.append(name + b":" + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_complete(self) -> None:
        """Stop measuring the time of a body."""
        if self._head_of_offer:
            return
        super().on_message_complete()
        self._body_since = None
        if (
            self.cycle.response_complete
        ):  # answered before its body ended, so that uvicorn's keep-alive timer no longer runs
            self._head_since = self.loop.time()

    def on_response_complete(self) -> None:
        """Note when the connection became idle."""
        super().on_response_complete()
        self.became_idle = next(TURNS)

    def _is_probe(self) -> bool:
        path = self.url.partition(b"?")[0].decode("latin-1")
        return is_probe({"method": self.parser.get_method().decode("latin-1"), "path": path}, self.options)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed. uvicorn calls this."""
        self._refuse(MalformedRequest("the request is not valid HTTP/1.1; check its head and its framing"))

    def _refuse(self, error: ServerError) -> ServerError:
        """Send an error for input that cannot become a request, and end the connection. Return the error."""
        if self._is_refused:
            return error
        self._is_refused = True
        self._head_since = self._body_since = None
        if self._owes_answer() and (self.pipeline or self.cycle.response_started or not self.cycle.more_body):
            self.cycle.keep_alive = False  # a valid request came first: it is answered, and then the connection ends
            return error
        if self._owes_answer():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = as_json(error, secrets.token_hex(8))
        response.headers["Connection"] = "close"
        self.metrics.rejected.labels(error.code, "none").inc()
        self.transport.write(_serialised(response))
        if self.transport.can_write_eof():  # TLS cannot close one direction
            self.transport.write_eof()
        self._hang_up_at = self.loop.time() + LINGER_S
        if len(self.connections) > most_connections(self.options):
            self.close()  # the next connection must be answered too, and may need the file descriptor
        return error

    def _owes_answer(self) -> bool:
        """Return whether the answer to the last request is incomplete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Check the time limits of the connection, every TICK_S."""
        now = self.loop.time()
        self._tick = self.loop.call_later(TICK_S, self._watch)
        if self._is_answer_unread(now):
            self._cut_answer_off()
        elif (self.pipeline and self._has_hung_up()) or self._is_overdue(now):
            self.transport.abort()
        elif self._head_since is not None:
            self._watch_head(now, self._head_since)

    def _has_hung_up(self) -> bool:
        """Return whether the client has closed its end, while a pipelined request waits and the socket is not read."""
        if not hasattr(select, "POLLRDHUP"):  # only Linux has it
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def _is_overdue(self, now: float) -> bool:
        has_lingered = self._hang_up_at is not None and now > self._hang_up_at
        return has_lingered or self._is_body_too_slow_after_its_answer(now)

    def _cut_answer_off(self) -> None:
        """End a connection whose client reads too slowly, and log it unless the application is still sending.

        An application that is still sending notices the end of the connection and logs it itself.
        """
        if self.cycle is not None and self.cycle.response_complete:
            request_id = self.cycle.scope["state"].get("request_id")
            log.warning("an answer was cut off because its client read too slowly", extra={"request_id": request_id})
            self.metrics.cancelled.labels("sending").inc()
        self.transport.abort()

    def _is_answer_unread(self, now: float) -> bool:
        """Return whether the client has read too slowly for too long.

        This also bounds `close()`, which waits indefinitely for the client to read what is in the buffer.
        """
        taken, elapsed_s = self.transport.taken_bytes, now - self._looked_at
        gained_s = (taken - self._taken_bytes) / SLOWEST_BYTES_PER_S
        self._taken_bytes, self._looked_at = taken, now
        if not self.transport.get_write_buffer_size():
            self._credit_s = self.options.send_timeout_s
            return False
        most_s = self.options.send_timeout_s + MOST_CREDIT_S
        self._credit_s = min(most_s, self._credit_s + gained_s) - elapsed_s
        return self._credit_s < 0

    def _is_body_too_slow_after_its_answer(self, now: float) -> bool:
        """Return whether a client still sends its body too long after the request was answered.

        A body that was refused unread, for example with 413, is received and dropped, so that its sender reads the
        answer.
        """
        if self._body_since is None or self._owes_answer():
            return False
        return now > self._body_since + self.options.body_timeout_s + self._body_bytes / SLOWEST_BYTES_PER_S

    def _watch_head(self, now: float, since: float) -> None:
        """Refuse a head that takes too long, and close a connection that has been idle too long."""
        if self._owes_answer():
            self._head_since = now  # uvicorn stops reading while a pipelined request waits
        elif now > since + self._head_timeout_s and self._head_bytes:
            self._refuse(RequestTooSlow("the request's head did not arrive in time; send it without pauses"))
        elif now > since + self._head_timeout_s:
            self.transport.close()

    @property
    def _head_timeout_s(self) -> float:
        return min(SPARE_HEAD_S, self.options.head_timeout_s) if self._is_spare else self.options.head_timeout_s


def most_connections(options: ServerOptions) -> int:
    """Return the most open connections, including those over the limit that get a refusal or send a health check."""
    return options.max_connections + max(4, options.max_connections // REFUSED_SHARE)


def _too_many_connections() -> TooManyConnections:
    return TooManyConnections("this server has too many open connections; try again in a few seconds")


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's head is larger than {HEAD_BYTES} bytes; send the tensor in the body")


def _serialised(response: Response) -> bytes:
    """Return a response as the bytes of HTTP/1.1."""
    lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
    return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])
