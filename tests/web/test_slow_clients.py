"""Five hundred clients that idle, stall or do not read, beside one that behaves: they are all closed, and it is served."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
import requests

from server.commands import serving
from tests import conftest
from tests.conftest import Serve
from tests.figures import figure
from tests.vaes import LocalVae
from tests.web.raw import QUERY, Connection, connected, head
from tests.web.test_protocol import open_sockets

SLOW = 500
DEADLINE_S = 3.0
BODY = np.zeros(256, "float32").tobytes()
UNREAD = head("GET", "/openapi.json")  # its answer is larger than the sockets' buffers, see `small_buffers`


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Both ends of every connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel holds megabytes of answers for each client that does not read."""

    def bind(host: str, port: int) -> socket.socket:
        listener = serving.bind(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(conftest, "bind", bind)


def stall(client: Connection, n: int) -> None:
    """A quarter each says nothing, half a head, half a body, or does not read."""
    part = (b"", b"POST / HTTP/1.1\r\nHost: loc", head("POST", f"/?{QUERY}", "Content-Length: 1024") + b"x", UNREAD)
    client.send(part[n % 4])


def served_ms(session: requests.Session, url: str) -> float:
    started = time.perf_counter()
    answer = session.post(url, params={"shape": "1,4,8,8", "dtype": "float32"}, data=BODY, timeout=300)
    assert answer.ok, answer.text
    return (time.perf_counter() - started) * 1e3


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_slow_clients_are_closed_while_others_are_served(
    serve: Serve, vaes: dict[str, LocalVae], capsys: pytest.CaptureFixture[str]
) -> None:
    deadlines = dict.fromkeys(("head_timeout_s", "body_timeout_s", "send_timeout_s"), DEADLINE_S)
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_queue=SLOW, **deadlines)
    with ExitStack() as stack, requests.Session() as session:
        alone = [served_ms(session, address) for _ in range(100)]
        memory = psutil.Process().memory_info().rss
        started = time.perf_counter()
        for n in range(SLOW):
            stall(stack.enter_context(connected(address, receive_buffer=4096)), n)
        while open_sockets(address) <= SLOW:
            pass
        beside: list[float] = []
        while open_sockets(address) > 1:
            beside += [served_ms(session, address) for _ in range(10)]
        closed_s = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - memory
    with capsys.disabled():
        figure(
            "slow clients",
            f"{SLOW} at once, deadline {DEADLINE_S:g} s: all closed {closed_s:.1f} s after the first came; "
            f"p99 of {len(beside)} normal requests {np.percentile(beside, 99):.0f} ms, without them "
            f"{np.percentile(alone, 99):.0f} ms; memory grew by {grown / 2**20:.0f} MiB",
        )
