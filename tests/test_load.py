"""The server's promises under load, each with its figure: nothing is lost, mixed up or leaked. Times are only printed.

VAE_TEST_SCALE multiplies the counts, for `make torture` and `make soak`.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from server.config import Settings, load_settings
from server.metrics import Metrics
from server.workers.process import ProcessEngine
from tests.conftest import running, write_models_yaml
from tests.figures import figure
from tests.load import Ask, Connection, Told, all_of, error_of, percentile, process, tree_bytes
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

SCALE = float(os.environ.get("VAE_TEST_SCALE", "1"))
GROWTH_BYTES = 20 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(int(1800 + 600 * SCALE))]


@pytest.fixture(scope="module")
def config(vaes: dict[str, LocalVae], tmp_path_factory: pytest.TempPathFactory) -> Path:
    models: dict[str, Any] = {name: {"repo": str(vaes[name].folder), "dtype": "float32"} for name in ("sd", "flux")}
    models["hunyuan"] = {"repo": str(vaes["hunyuan"].folder), "dtype": "float32"}
    models["half"] = {"repo": str(vaes["sd"].folder), "dtype": "bfloat16"}
    models["sd"]["preload"] = True
    return write_models_yaml(tmp_path_factory.mktemp("load") / "models.yaml", models, "sd")


def mixed_asks() -> list[Ask]:
    """Requests of many kinds, with latents of their own."""
    asks = []
    for seed, side in enumerate((4, 6, 8, 8, 8, 12)):
        for params in ({"image_format": "png"}, {"output_type": "pt"}, {}):
            asks.append(Ask.of((1, 4, side, side), seed, **params))
            asks.append(Ask.of((1, 4, side, side), 50 + seed, model="half", **params))
        asks.append(Ask.of((1, 16, side, side), seed, model="flux", image_format="png"))
        asks.append(Ask.of((1, side * side // 4, 64), seed, model="flux", height=8 * side, width=8 * side))
        asks.append(Ask.of((2, 4, side, side), seed, output_type="pt", partial_postprocess=True))
    asks.append(Ask.of((1, 16, 3, 4, 4), 1, model="hunyuan", output_type="mp4"))
    asks.append(Ask.of((1, 16, 2, 4, 4), 2, model="hunyuan", output_type="pt"))
    return asks


def test_mixed_requests_at_once_get_what_each_gets_alone(config: Path) -> None:
    asks = mixed_asks()
    total = int(2000 * SCALE)
    with process(config, "--max-queue", "64") as (url, _):
        with Connection(url) as connection:
            alone = [connection.ask(ask) for ask in asks]
        assert [told.status for told in alone] == [200] * len(asks)
        picks = [random.Random(i).randrange(len(asks)) for i in range(total)]
        told = all_of(url, [asks[pick] for pick in picks], clients=16)
    wrong = sum(answer != alone[pick].body for answer, pick in zip((t.body for t in told), picks, strict=True))
    figure(
        "mixed concurrent requests compared with their solo decode", f"{total:,} of {len(asks)} kinds, {wrong} differ"
    )
    assert wrong == 0


def test_overload_is_refused_early_and_loses_nothing(config: Path) -> None:
    asks, queue = [Ask.of((1, 4, 48, 48), seed, image_format="png") for seed in range(8)], 8
    with process(config, "--max-queue", str(queue)) as (url, _):
        with Connection(url) as connection:
            solo = float(np.median([connection.ask(asks[0]).seconds for _ in range(12)][2:]))
            expected = [connection.ask(ask).body for ask in asks]
        started = time.perf_counter()
        # Of 80 clients 8 wait in the queue; the others ask together ten times as often as the server can answer.
        told = all_of(url, [asks[i % len(asks)] for i in range(int(1000 * SCALE))], 10 * queue, pause_s=8 * solo)
        seconds = time.perf_counter() - started
    accepted = [(i, answer) for i, answer in enumerate(told) if answer.status == 200]
    refused = [answer for answer in told if answer.status == 429]
    assert len(accepted) + len(refused) == len(told), {answer.status for answer in told}
    assert all(answer.body == expected[i % len(asks)] for i, answer in accepted)
    assert refused
    assert all(error_of(answer) == "queue_full" and int(answer.retry_after or 0) >= 1 for answer in refused)
    slowest = percentile([answer.seconds for _, answer in accepted], 99)
    figure(
        "overload at 10x capacity",
        f"{len(accepted)} answered, {len(refused)} refused, 0 lost; accepted p99 {slowest:.0f} ms "
        f"({slowest / (1e3 * (queue + 1) * solo):.2f} x (queue + 1) x solo), 429 p99 "
        f"{percentile([answer.seconds for answer in refused], 99):.0f} ms, goodput "
        f"{len(accepted) / seconds * solo:.0%} of one client's rate",
    )


@pytest.mark.parametrize("drains", [int(10 * SCALE)])
def test_a_drain_answers_all_that_was_accepted(config: Path, drains: int) -> None:
    slowest, answered = 0.0, 0
    ask = Ask.of((1, 4, 32, 32), image_format="png")
    for _ in range(drains):
        with process(config, "--max-queue", "64") as (url, server):
            told: list[Told] = []
            clients = [threading.Thread(target=tell, args=(url, ask, told)) for _ in range(20)]
            for client in clients:
                client.start()
            with Connection(url) as watcher:
                until(lambda: watcher.waiting() + len(told) == 20)  # noqa: B023  # used up within the turn
                uploads = half_open_uploads(url, 5)
                signalled = time.monotonic()
                server.send_signal(signal.SIGTERM)
                until(lambda: b"503" in health(url) or server.poll() is not None)
            for client in clients:
                client.join()
            assert server.wait(PATIENCE_S) == 0
            slowest = max(slowest, time.monotonic() - signalled)
            assert [answer.status for answer in told] == [200] * 20
            answered += len(told)
            for upload in uploads:
                upload.close()
    figure(
        "SIGTERM under load, with 5 half-open uploads",
        f"{drains} drains, {answered} of {20 * drains} accepted requests answered, exit status 0, at most {slowest:.1f} s",
    )


def tell(url: str, ask: Ask, told: list[Told]) -> None:
    told.extend(all_of(url, [ask], 1))


def half_open_uploads(url: str, count: int) -> list[socket.socket]:
    address = urlsplit(url)
    uploads = [socket.create_connection((address.hostname, address.port), 300) for _ in range(count)]
    for upload in uploads:
        upload.sendall(
            b"POST /?shape=1,4,8,8&dtype=float32 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1024\r\n\r\nhalf"
        )
    return uploads


def health(url: str) -> bytes:
    """The status line, empty when nobody listens any more."""
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname, address.port), PATIENCE_S) as probe:
            probe.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            return probe.recv(15)
    except OSError:
        return b""


def test_a_second_signal_ends_at_once_and_leaves_no_process(config: Path) -> None:
    with process(config) as (url, server):
        children = worker_pids(server)
        client = threading.Thread(target=ask_and_be_cut_off, args=(url,))
        client.start()
        with Connection(url) as watcher:
            until(lambda: watcher.waiting() == 1)
            server.send_signal(signal.SIGTERM)
            until(lambda: b"503" in health(url))
            signalled = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE_S)
        seconds = time.monotonic() - signalled
        assert server.stderr
        assert "Traceback" not in server.stderr.read()
        client.join()
        until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children))
    figure("a second SIGTERM", f"ended after {seconds:.1f} s, no process left")


def ask_and_be_cut_off(url: str) -> None:
    with suppress(OSError, http.client.HTTPException):
        all_of(url, [Ask.of((8, 4, 64, 64), output_type="pt")], 1)


def worker_pids(server: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(server.pid).children(recursive=True)]


def soak(url: str, pid: int, requests: int) -> list[int]:
    """Memory of all processes after each tenth of the requests; the first tenths are a warm-up that fills caches."""
    asks = [Ask.of((1, 4, side, side), side, image_format="png") for side in (4, 6, 8, 12)]
    samples = []
    for _ in range(10):
        told = all_of(url, [asks[i % len(asks)] for i in range(requests // 10)], clients=4)
        assert all(answer.status == 200 for answer in told)
        samples.append(tree_bytes(pid))
    return samples


def growth(samples: list[int]) -> int:
    """Between the fourth tenth and the last ones."""
    return int(np.median(samples[-3:]) - np.median(samples[2:5]))


def test_memory_does_not_grow_and_a_leak_would_be_seen(config: Path) -> None:
    count = int(4000 * SCALE)
    with process(config) as (url, server):
        grown = growth(soak(url, server.pid, count))
    settings = load_settings(config=config)
    with leaky(settings) as (url, pid):
        leaked = growth(soak(url, pid, 1000))
    figure(
        "soak",
        f"{count:,} requests: memory grew by {grown / 2**20:.1f} MiB; a control that leaks, by {leaked / 2**20:.0f} MiB",
    )
    assert grown < GROWTH_BYTES
    assert leaked > GROWTH_BYTES


@contextmanager
def leaky(settings: Settings) -> Iterator[tuple[str, int]]:
    """The control of the soak: a server whose worker keeps what it should forget."""
    engines: list[ProcessEngine] = []

    def engine(settings: Settings, metrics: Metrics) -> ProcessEngine:
        engines.append(ProcessEngine(settings, "cpu", metrics, worker="tests.leaky"))
        return engines[0]

    with running(settings, engine) as url:
        assert engines[0].pid
        yield url, engines[0].pid
