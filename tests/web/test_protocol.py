"""Each bound on a connection, over raw sockets, with deadlines short enough to wait for."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import httptools
import psutil
import pytest
import requests
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.web import protocol
from server.web.protocol import HEAD_BYTES, MAX_PIPELINED, BoundedProtocol
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.waiting import until
from tests.web.raw import QUERY, Connection, RawAnswer, connected, good, head
from tests.web.test_errors import BODY, LEAKS, gate

HEALTH = head("GET", "/health")
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture
def brief(serve: Serve, vaes: dict[str, LocalVae]) -> str:
    """A server that waits for half a second."""
    return serve({"sd": {"repo": str(vaes["sd"].folder)}}, head_timeout_s=0.5, body_timeout_s=0.5, send_timeout_s=0.5)


def assert_refused(answer: RawAnswer, status: int, code: str, words: str) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert set(told) == {"error", "code", "request_id"}
    assert (told["code"], told["request_id"]) == (code, answer.headers["x-request-id"])
    assert re.search(words, told["error"]), told
    assert not LEAKS.search(answer.body.decode())


def assert_refused_and_closed(connection: Connection, status: int, code: str, words: str) -> None:
    answer = connection.answer()
    assert_refused(answer, status, code, words)
    assert answer.headers["connection"] == "close"
    assert connection.rest() == b""


def test_half_a_head_is_408(brief: str) -> None:
    with connected(brief) as client:
        client.send(HEALTH[:-4])
        assert_refused_and_closed(client, 408, "request_too_slow", "the request's head")


def drip(client: Connection, data: bytes) -> None:
    """Send it twenty times a second until there is an answer; the servers here allow half a second."""
    client.socket.settimeout(0.05)
    for _ in range(200):
        client.send(data)
        with suppress(TimeoutError):
            client.socket.recv(1, socket.MSG_PEEK)
            client.socket.settimeout(20)
            return
    pytest.fail("ten seconds of drops were taken")


def test_a_head_is_late_even_when_bytes_keep_coming(brief: str) -> None:
    with connected(brief) as client:
        client.send(b"GET /health HTTP/1.1\r\n")
        drip(client, b"X: y\r\n")
        assert_refused_and_closed(client, 408, "request_too_slow", "the request's head")


def test_a_connection_that_says_nothing_is_closed(brief: str) -> None:
    with connected(brief) as client:
        assert client.rest() == b""


def test_empty_lines_do_not_keep_a_connection(brief: str) -> None:
    with connected(brief) as client:
        client.send(HEALTH)
        assert client.answer().status == 200
        client.send(b"\r\n")  # ends uvicorn's keep-alive timer and begins no request
        assert_refused_and_closed(client, 408, "request_too_slow", "the request's head")


def test_half_a_second_head_is_408(brief: str) -> None:
    with connected(brief) as client:
        client.send(HEALTH + HEALTH[:20])
        assert client.answer().status == 200
        assert_refused_and_closed(client, 408, "request_too_slow", "the request's head")


@pytest.mark.parametrize(
    "part",
    [
        head("POST", "/?shape=1,4,8,8&dtype=float32", "Content-Length: 1024") + BODY[:100],
        head("POST", "/?shape=1,4,8,8&dtype=float32", CHUNKED) + b"1\r\nx\r\n" * 100,
        head("POST", "/", "Content-Type: application/json", "Content-Length: 1024") + b"{",
        head("POST", "/?shape=1,4,8,8&dtype=float32", "Content-Length: 1024", "Expect: 100-continue"),
    ],
    ids=["length", "chunks", "JSON", "expecting 100"],
)
def test_half_a_body_is_408(brief: str, part: bytes) -> None:
    with connected(brief) as client:
        client.send(part)
        assert_refused_and_closed(client, 408, "request_too_slow", "bytes of the body arrived in time")


def test_a_body_that_drips_is_408(brief: str) -> None:
    with connected(brief) as client:
        client.send(head("POST", "/?shape=1,4,8,8&dtype=float32", "Content-Length: 1024"))
        drip(client, b"x")
        assert_refused_and_closed(client, 408, "request_too_slow", "bytes of the body arrived in time")


def test_a_body_that_was_refused_unread_is_dropped_for_as_long_as_one_that_is_read(brief: str) -> None:
    with connected(brief) as client:
        client.send(head("POST", "/", "Content-Length: 999999999"))
        assert client.answer().status == 413
        client.send(b"x" * 1000)
        assert client.rest() == b""


def test_a_refused_body_that_does_come_leaves_the_connection_open(brief: str) -> None:
    with connected(brief) as client:
        client.send(head("POST", "/nobody", "Content-Length: 1000"))
        assert_refused(client.answer(), 404, "unknown_model", "no such model")
        client.send(b"x" * 1000 + HEALTH)
        assert client.answer().status == 200


def test_a_refused_body_that_does_come_leaves_no_connection_idle(brief: str) -> None:
    with connected(brief) as client:
        client.send(head("POST", "/nobody", "Content-Length: 1000"))
        assert client.answer().status == 404
        client.send(b"x" * 1000)
        assert client.rest() == b""


@pytest.mark.parametrize("part", [HEALTH[:-2], HEALTH[:-2] + b"X: "], ids=["between headers", "in a header"])
def test_a_head_over_the_limit_is_431(url: str, part: bytes) -> None:
    with connected(url) as client:
        client.send(part + b"X: y\r\n" * (HEAD_BYTES // 6) if part[-2:] == b"\r\n" else part + b"x" * (8 << 20))
        assert_refused_and_closed(client, 431, "head_too_large", "larger than 65536 bytes")


def test_a_whole_head_over_the_limit_is_431(url: str) -> None:
    with connected(url) as client:
        client.send(head("GET", "/health", f"X: {'y' * HEAD_BYTES}"))
        assert_refused_and_closed(client, 431, "head_too_large", "larger than 65536 bytes")


def test_a_long_path_and_many_trailers_count_as_head(url: str) -> None:
    with connected(url) as client:
        client.send(b"GET /" + b"x" * HEAD_BYTES)
        assert_refused_and_closed(client, 431, "head_too_large", "larger than 65536 bytes")
    with connected(url) as client:
        client.send(head("POST", "/?shape=1,4,8,8&dtype=float32", CHUNKED) + b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 100_000)
        assert_refused_and_closed(client, 431, "head_too_large", "larger than 65536 bytes")


def test_a_head_under_the_limit_is_read(url: str) -> None:
    with connected(url) as client:
        for _ in range(3):
            client.send(head("GET", "/health", f"X: {'y' * (HEAD_BYTES - 200)}"))
            assert client.answer().status == 200


def test_large_bodies_in_small_chunks_are_no_head(url: str) -> None:
    with connected(url) as client:
        client.send(head("POST", "/?shape=1,4,32,32&dtype=float32", CHUNKED))
        client.send(b"1\r\n\0\r\n" * (4 * 32 * 32 * 4) + b"0\r\n\r\n")
        assert client.answer().status == 200
        client.send(HEALTH)
        assert client.answer().status == 200


def open_sockets(url: str) -> int:
    """The server's own ends of connections; the server is a thread of this process."""
    port = urlsplit(url).port
    found = psutil.Process().net_connections("tcp4")
    return sum(bool(one.raddr) and one.laddr.port == port for one in found)


@pytest.fixture
def large(serve: Serve, vaes: dict[str, LocalVae]) -> str:
    models = {"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32", "limits": {"max_pixels": 1 << 24}}}
    return serve(models, send_timeout_s=0.5, head_timeout_s=1)


LARGE = "/?shape=3,4,96,96&dtype=float32&output_type=pt"  # an answer of 21 MB, more than any socket's buffer
LARGE_BODY = bytes(3 * 4 * 96 * 96 * 4)


@pytest.mark.parametrize("lines", [(), ("Connection: close",)], ids=["kept alive", "closing"])
def test_a_large_answer_that_nobody_reads_is_dropped(
    large: str, lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES_PER_S", 1 << 30)
    with connected(large, receive_buffer=4096, timeout_s=60) as client:
        client.send(head("POST", LARGE, f"Content-Length: {len(LARGE_BODY)}", *lines) + LARGE_BODY)
        client.socket.recv(1)
        assert open_sockets(large) == 1
        while open_sockets(large):
            pass


def test_a_client_that_read_fast_and_then_stops_is_dropped(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has read earns it no more than `MOST_CREDIT_S`."""
    monkeypatch.setattr(protocol, "MOST_CREDIT_S", 1.0)
    with connected(large, receive_buffer=1 << 16, timeout_s=60) as client:
        client.send(head("POST", LARGE, f"Content-Length: {len(LARGE_BODY)}") + LARGE_BODY)
        received = 0
        while received < 8 << 20:  # at 64 KiB a second it would have two minutes for that
            received += len(client.socket.recv(1 << 20))
        assert open_sockets(large) == 1
        until(lambda: open_sockets(large) == 0, "the end of its connection")


def test_a_large_answer_has_time_by_its_size(large: str) -> None:
    with connected(large, receive_buffer=1 << 16, timeout_s=60) as client:
        client.send(head("POST", LARGE, f"Content-Length: {len(LARGE_BODY)}") + LARGE_BODY)
        client.socket.recv(1, socket.MSG_PEEK)
        with connected(large) as clock:
            clock.send(HEALTH[:-4])
            assert clock.answer().status == 408  # so more than send_timeout_s has passed
        assert len(client.answer().body) == 3 * 3 * 768 * 768 * 4


def test_one_connection_too_many_ends_the_one_that_was_idle_for_longest(
    serve: Serve, vaes: dict[str, LocalVae]
) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_connections=2)
    with connected(address) as first, connected(address) as second:
        for client in (first, second):
            client.send(HEALTH)
            assert client.answer().status == 200
        with connected(address) as third:
            third.send(HEALTH)
            assert third.answer().status == 200
            assert first.rest() == b""
            second.send(HEALTH)
            assert second.answer().status == 200


def test_a_refused_client_is_heard_no_longer_than_the_linger(brief: str) -> None:
    with connected(brief) as client, suppress(ConnectionError):
        client.send(b"nonsense\r\n\r\n")
        assert client.answer().status == 400
        while True:
            client.send(b"x")


BODIED = head("POST", f"/?{QUERY}", "Content-Length: 1024")
MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": head("GRAB", "/"),
    "an unknown version": b"GET / HTTP/3.7\r\nHost: localhost\r\n\r\n",
    "two lengths": head("POST", "/", "Content-Length: 5", "Content-Length: 6") + b"hello!",
    "length and chunks": head("POST", "/", "Content-Length: 5", CHUNKED) + b"0\r\n\r\n",
    "a length that is none": head("POST", "/", "Content-Length: 5x"),
    "a negative length": head("POST", "/", "Content-Length: -5"),
    "a space before the colon": head("GET", "/", "X : y"),
    "a folded header": head("GET", "/", "X: y", " z"),
    "a bare carriage return": head("GET", "/", "X: y\rZ: 0"),
    "NUL in a header": head("GET", "/", "X: \0"),
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path beyond ASCII": head("GET", "/\xff"),
    "an absolute target without a host": head("GET", "http://"),
    "a broken chunk": head("POST", f"/?{QUERY}", CHUNKED) + b"zz\r\n",
    "a chunk longer than it says": head("POST", f"/?{QUERY}", CHUNKED) + b"1\r\nabc\r\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_http_is_400(url: str, case: str) -> None:
    with connected(url) as client:
        client.send(MALFORMED[case])
        assert_refused_and_closed(client, 400, "malformed_request", "not valid HTTP/1.1")


@pytest.mark.parametrize(
    "request_",
    [
        head("GET", "/", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        head("CONNECT", "example.com:443"),
    ],
    ids=["WebSocket", "CONNECT"],
)
def test_an_upgrade_is_refused(url: str, request_: bytes) -> None:
    with connected(url) as client:
        client.send(request_)
        assert_refused_and_closed(client, 400, "upgrade_refused", "without Upgrade, and do not use CONNECT")


H2C = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"


@pytest.mark.parametrize(
    "request_",
    [
        head("POST", f"/?{QUERY}", *H2C, "Content-Length: 1024") + BODY,
        head("POST", f"/?{QUERY}", *H2C, CHUNKED) + b"400\r\n" + BODY + b"\r\n0\r\n\r\n",
        head("GET", "/health", *H2C),
    ],
    ids=["with a body", "in chunks", "without a body"],
)
@pytest.mark.parametrize("piece", [1, 100, 1 << 20], ids=lambda piece: f"{piece} bytes at a time")
def test_an_offer_of_http_2_is_ignored(url: str, request_: bytes, piece: int) -> None:
    """As RFC 9110, 7.8 allows: Java's client and `curl --http2` offer it with every request."""
    with connected(url) as client:
        both = request_ + request_ + HEALTH
        for start in range(0, len(both), piece):
            client.send(both[start : start + piece])
        first, second, last = (client.answer() for _ in range(3))
    assert first.status == last.status == 200
    assert first.body == second.body
    assert json.loads(last.body)["status"] == "ready"


def test_what_is_unusual_and_right_is_answered(url: str) -> None:
    for request, status in [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (head("GET", "http://localhost/health"), 200),
        (head("OPTIONS", "*"), 404),
        (head("PROPFIND", "/"), 405),
        (head("GET", "/health", "Expect: the unexpected"), 200),
        (head("GET", "/health", "Content-Length: 5") + b"hello", 200),
        (head("POST", f"/?{QUERY}", "Expect: 100-continue", "Content-Length: 1024") + BODY, 200),
        (b"\r\n\r\n" + HEALTH, 200),
    ]:
        with connected(url) as client:
            client.send(request)
            assert client.answer().status == status, request


def test_requests_in_a_row_are_answered_in_order(url: str) -> None:
    with connected(url) as client:
        client.send(good(BODY) + HEALTH + head("GET", "/nobody/here") + good(BODY))
        assert [client.answer().status for _ in range(4)] == [200, 200, 404, 200]


@pytest.mark.parametrize("rest", [b"extra bytes", b"\0" * 1000, head("GET", "/", "X : y"), b"G"])
def test_bytes_after_a_good_request_do_not_cost_its_answer(brief: str, rest: bytes) -> None:
    with connected(brief) as client:
        client.send(good(BODY) + rest)
        assert client.answer().status == 200
        told = client.rest()
        assert told == b"" or json.loads(told.partition(b"\r\n\r\n")[2])["code"] in (
            "malformed_request",
            "request_too_slow",
        )


def test_a_flood_of_requests_is_answered_so_far_and_closed(url: str) -> None:
    with connected(url) as client:
        client.send(HEALTH * 1000)
        answered = client.rest().count(b"HTTP/1.1 200 OK")
        assert 1 + MAX_PIPELINED <= answered < 200


def test_half_a_head_waits_while_the_request_before_it_runs(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened), head_timeout_s=0.3)
    with connected(address) as client, connected(address) as other:
        client.send(good(BODY) + HEALTH[:20])
        other.send(HEALTH[:20])
        assert other.answer().status == 408  # so the time has passed
        opened.set()
        assert client.answer().status == 200
        client.send(HEALTH[20:])
        assert client.answer().status == 200


def test_a_broken_body_stops_its_request(brief: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with connected(brief) as client:
        client.send(head("POST", f"/?{QUERY}", CHUNKED) + b"10\r\n" + b"x" * 16 + b"\r\n")
        client.send(b"nonsense\r\n")
        assert_refused_and_closed(client, 400, "malformed_request", "not valid HTTP/1.1")
    while "inf_queue_size 0.0\n" not in requests.get(brief + "metrics", timeout=300).text:
        pass
    logged = [record.__dict__.get("status") for record in caplog.records if record.name == "server.web.request_scope"]
    assert 499 in logged, "its client is gone, as far as the request can tell"
    assert 408 not in logged, "it must not wait for the rest of its body"


def test_uvicorn_still_has_what_the_protocol_leans_on() -> None:
    """After an upgrade: read HttpToolsProtocol again before this list is changed."""
    overridden = ("connection_made", "connection_lost", "data_received", "send_400_response", "_start_asgi_task")
    callbacks = ("on_message_begin", "on_headers_complete", "on_body", "on_message_complete", "on_response_complete")
    assert {*overridden, *callbacks} == {
        name for name in vars(BoundedProtocol).keys() & vars(HttpToolsProtocol) if not name.startswith("__")
    }
    made = HttpToolsProtocol(uvicorn.Config(lambda: None, ws="none"), ServerState(), {}, asyncio.new_event_loop())
    made.on_message_begin()
    for name in ("loop", "connections", "transport", "cycle", "pipeline", "parser", "url", "headers"):
        assert hasattr(made, name), name
    made.loop.close()
    cycle = inspect.getsource(RequestResponseCycle.__init__)
    for name in ("keep_alive", "disconnected", "message_event", "response_started", "response_complete", "more_body"):
        assert f"self.{name}" in cycle, name
    told = inspect.getsource(HttpToolsProtocol.data_received)
    assert "except httptools.HttpParserError" in told
    assert "self.send_400_response(" in told
    assert issubclass(httptools.HttpParserCallbackError, httptools.HttpParserError)
    assert httptools_impl.STATUS_LINE[431] == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
