"""Closed-loop clients with kept connections: each sends its next request when it has its answer. Knows only bytes.

The clients share the cores with the server that they measure, so they do as little as possible: a request is one write
of bytes that were made before, and only the status, the length and the body of an answer are read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
REFUSED_PAUSE_S = 0.05
ANSWER_S = 300.0

Check = Callable[[int, bytes], None]  # the request's index, the body


@dataclass
class Tally:
    """The results of the clients of one run.

    last: the index of a request, and the body of its answer.
    """

    latencies_ms: list[float] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    last: tuple[int, bytes] = (0, b"")


class WrongAnswer(Exception):
    """The status is neither 200 nor a refusal, or the body is not the expected one."""


class Connection(asyncio.Protocol):
    """A connection that sends one request at a time."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's class does not inherit from it
        self._received = bytearray()
        self._head_bytes = self._wanted = 0
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def data_received(self, data: bytes) -> None:
        """Collect the bytes of an answer, and finish it when it is complete."""
        self._received += data
        if not self._wanted:
            head_end = self._received.find(HEAD_END)
            if head_end < 0:
                return
            length = LENGTH.search(self._received, 0, head_end)
            if not length:  # all servers send a Content-Length
                self.transport.abort()
                return
            self._head_bytes = head_end + len(HEAD_END)
            self._wanted = self._head_bytes + int(length[1])
        if len(self._received) >= self._wanted and self._answer:
            status = int(self._received[9:12])  # HTTP/1.1 200 OK
            self._answer.set_result((status, bytes(memoryview(self._received)[self._head_bytes : self._wanted])))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request that waits for its answer."""
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request, and return the status and the body of its answer."""
        self._received, self._wanted = bytearray(), 0
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer


async def connect(port: int) -> Connection:
    """Return a new connection to a port of this machine."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float, check: Check) -> Tally:
    """Let clients send requests for some seconds, wait for their last answers, and return the results.

    requests: sent in turn. check: called with each answer. Raises WrongAnswer.
    """
    connections = [await connect(port) for _ in range(clients)]
    tally = Tally()
    await connections[0].ask(requests[0])  # so that the threads of the server are awake
    started = time.perf_counter()

    async def client(number: int) -> None:
        index = number
        while (sent := time.perf_counter()) < started + seconds:
            index = (index + 1) % len(requests)
            status, body = await connections[number].ask(requests[index])
            if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
                tally.refused += 1
                await asyncio.sleep(REFUSED_PAUSE_S)
                continue
            if status != HTTPStatus.OK:
                raise WrongAnswer(f"status {status}: {body[:300]!r}")
            tally.latencies_ms.append((time.perf_counter() - sent) * 1e3)
            check(index, body)
            tally.last = index, body

    try:
        async with asyncio.timeout(seconds + ANSWER_S):
            await asyncio.gather(*(client(number) for number in range(clients)))
        tally.seconds = time.perf_counter() - started
    finally:
        for connection in connections:
            connection.transport.close()
    return tally
