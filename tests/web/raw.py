"""A client that speaks bytes: what no HTTP library would send, and what exactly came back."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

QUERY = "shape=1,4,8,8&dtype=float32"


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    def __init__(self, url: str, timeout_s: float = 300, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout_s)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((urlsplit(url).hostname, urlsplit(url).port))
        self._received = bytearray()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _read_to(self, length: int) -> bytes:
        while len(self._received) < length:
            if not (data := self.socket.recv(1 << 16)):
                raise EOFError(f"closed after {len(self._received)} of {length} bytes")
            self._received += data
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def answer(self, is_head: bool = False) -> RawAnswer:
        """The next answer. Raises EOFError when the connection ends before it does."""
        while b"\r\n\r\n" not in self._received:
            if not (data := self.socket.recv(1 << 16)):
                raise EOFError(f"closed after {bytes(self._received[:200])!r}")
            self._received += data
        head = self._read_to(self._received.index(b"\r\n\r\n") + 4).decode("latin-1")
        line, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        status = int(line.split()[1])
        if status == 100:
            return self.answer(is_head)
        return RawAnswer(status, headers, b"" if is_head else self._read_to(int(headers["content-length"])))

    def rest(self) -> bytes:
        """Everything until the server closes; a reset counts as closing."""
        try:
            while data := self.socket.recv(1 << 16):
                self._received += data
        except ConnectionResetError:
            pass
        return bytes(self._received)


@contextmanager
def connected(url: str, **options: Any) -> Iterator[Connection]:
    connection = Connection(url, **options)
    with connection.socket:
        yield connection


def head(method: str = "POST", target: str = f"/?{QUERY}", *lines: str, host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def good(body: bytes) -> bytes:
    return head("POST", f"/?{QUERY}", f"Content-Length: {len(body)}") + body
