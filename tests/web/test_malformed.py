"""Thousands of wrong requests: each gets its JSON sentence, and the server is as good as before."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import requests

from tests.conftest import Serve
from tests.figures import figure
from tests.vaes import LocalVae
from tests.web.malformed import BODY, GOOD, KINDS, UNFRAMED
from tests.web.raw import Connection, RawAnswer

COUNT = int(os.environ.get("VAE_TEST_MALFORMED", "20000"))
CLIENTS = 8
EVERY = 500
HANG_S = 5.0
LEAKS = re.compile(rb"0x[0-9a-f]{6,}|Traceback|/home|/usr|site-packages|/tmp")


@dataclass
class Found:
    """What the clients saw. Appending to a list is atomic, so they share it."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def fault_of(answer: RawAnswer) -> str | None:
    if answer.status < 400:
        return None
    if answer.status >= 500:
        return f"unintended {answer.status}: {answer.body[:200]!r}"
    if LEAKS.search(answer.body):
        return f"leak: {answer.body!r}"
    try:
        told = json.loads(answer.body)
    except ValueError:
        return f"not JSON: {answer.body[:200]!r}"
    return None if {"error", "code", "request_id"} == set(told) else f"not our JSON: {told}"


class Client:
    """Keeps its connection for as long as the server does."""

    def __init__(self, url: str, found: Found) -> None:
        self._url, self._found = url, found
        self._connection: Connection | None = None

    def ask(self, request: bytes) -> RawAnswer:
        connection, self._connection = self._connection or Connection(self._url, HANG_S), None
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before its end: the answer is there
                connection.send(request)
            answer = connection.answer()
            if answer.headers.get("connection") != "close":
                self._connection = connection
            return answer
        finally:
            if self._connection is None:
                connection.socket.close()

    def close(self) -> None:
        if self._connection:
            self._connection.socket.close()
            self._connection = None

    def try_one(self, kind: str, request: bytes) -> None:
        started = time.perf_counter()
        try:
            answer = self.ask(request)
        except (OSError, EOFError) as error:
            self._found.faults.append(f"{kind}: {type(error).__name__} {error} for {request[:300]!r}")
            return
        if answer.status == 408:  # it waited for a rest that never comes
            self.close()
        else:
            self._found.latencies_ms.append((time.perf_counter() - started) * 1e3)
        self._found.statuses[answer.status] += 1
        if fault := fault_of(answer):
            self._found.faults.append(f"{kind}: {fault} for {request[:300]!r}")


def abuse(url: str, seed: int, count: int, expected: bytes, found: Found) -> None:
    rng, client = random.Random(seed), Client(url, found)
    kinds = list(KINDS)
    for n in range(count):
        kind = kinds[n % len(kinds)]
        client.try_one(kind, KINDS[kind](rng))
        if kind in UNFRAMED:
            client.close()  # what the server took for another request would be answered too
        if n % EVERY == EVERY - 1:
            client.close()
            if (answer := client.ask(GOOD)).body != expected:
                found.faults.append(f"a good request after {kind}: {answer.status} {answer.body[:200]!r}")
    client.close()


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
@pytest.mark.timeout(max(1800, COUNT // 50))
def test_wrong_requests_get_a_sentence_and_leave_the_server_as_it_was(
    serve: Serve, vaes: dict[str, LocalVae], capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32", "limits": {"max_pixels": 65536}}}
    address = serve(models, head_timeout_s=1.5, body_timeout_s=0.25)
    expected = requests.post(address, params={"shape": "1,4,8,8", "dtype": "float32"}, data=BODY, timeout=300).content
    found, started = Found(), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(abuse, address, seed, COUNT // CLIENTS, expected, found) for seed in range(CLIENTS)]:
            future.result()
    spent_s = time.perf_counter() - started
    with capsys.disabled():
        figure(
            "malformed requests",
            f"{COUNT:,} of {len(KINDS)} kinds in {spent_s:.0f} s: {len(found.faults)} crashes, hangs, unintended 5xx, "
            f"answers that are not JSON or leak; p99 {np.percentile(found.latencies_ms, 99):.0f} ms; "
            f"answers {dict(sorted(found.statuses.items()))}",
        )
    assert not found.faults, "\n".join(found.faults[:20])
    assert sum(found.statuses.values()) == COUNT
    assert len(KINDS) >= 40
