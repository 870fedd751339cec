"""Clients for load: keep-alive connections, every answer kept, and the memory of a server's processes."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S


@dataclass(frozen=True)
class Ask:
    """One decode request."""

    path: str
    body: bytes
    accept: str = "*/*"

    @classmethod
    def of(cls, shape: Sequence[int], seed: int = 0, model: str = "", accept: str = "*/*", **params: Any) -> Ask:
        latents = np.random.default_rng(seed).normal(size=shape).astype("float32")
        query = urlencode({"shape": list(shape), "dtype": "float32", **params}, doseq=True)
        return cls(f"/{model}?{query}", latents.tobytes(), accept)


@dataclass(frozen=True)
class Told:
    """One answer."""

    status: int
    body: bytes
    retry_after: str | None
    seconds: float


class Connection:
    """One client that keeps its connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, ask: Ask) -> Told:
        started = time.perf_counter()
        headers = {"Content-Type": "tensor/binary", "Accept": ask.accept}
        self._connection.request("POST", ask.path, ask.body, headers)
        response = self._connection.getresponse()
        body = response.read()
        return Told(response.status, body, response.getheader("Retry-After"), time.perf_counter() - started)

    def get(self, path: str) -> str:
        self._connection.request("GET", path)
        return self._connection.getresponse().read().decode()

    def waiting(self) -> float:
        """Accepted requests without an answer."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if line[0] != "#")
        return float(lines["vae_inflight"]) + float(lines["vae_queue_depth"])


def all_of(url: str, asks: Sequence[Ask], clients: int, pause_s: float = 0.0) -> list[Told]:
    """Ask everything with so many clients at once; the answers in the order of the requests.

    pause_s: how long a client that was refused waits before it asks for something else.
    """
    turn = iter(range(len(asks)))
    told: dict[int, Told] = {}

    def client() -> None:
        with Connection(url) as connection:
            for index in turn:  # one iterator for all: each index is taken once
                told[index] = connection.ask(asks[index])
                if told[index].status == 429:
                    time.sleep(pause_s)

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    return [told[index] for index in range(len(asks))]


@contextmanager
def process(
    config: Path,
    *flags: str,
    prefix: Sequence[str] = (),
    log: list[str] | None = None,
    package: str = "server",
    folder: Path = REPOSITORY,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`python -m server serve` as a user starts it: its URL and its process.

    prefix: a command that runs it. log: receives the lines that it logs before it is ready. package: its name, which is
    found in `folder`.
    """
    command = [
        *prefix,
        sys.executable,
        "-m",
        package,
        "serve",
        "--port",
        "0",
        "--log-level",
        "warning",
        "--config",
        str(config),
    ]
    server = subprocess.Popen([*command, *flags], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        told = [] if log is None else log
        while not (line := server.stderr.readline()).startswith("ready: "):
            assert line, told
            told.append(line)
        yield line.split()[1], server
    finally:
        end(server)


def end(server: subprocess.Popen[str]) -> None:
    """End it and read the rest of its log; kill it with all its descendants if it does not end."""
    descendants = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    try:
        server.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        for process in (server, *descendants):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; what they share is counted once."""
    root = psutil.Process(pid)
    return sum(process.memory_full_info().uss for process in (root, *root.children(recursive=True)))


def percentile(seconds: Sequence[float], percent: float) -> float:
    """In milliseconds."""
    return float(np.percentile(seconds, percent)) * 1e3 if seconds else float("nan")


def error_of(told: Told) -> str:
    return str(json.loads(told.body)["code"])
