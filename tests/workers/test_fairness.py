"""Work that no client waits for ends, and small requests do not wait for large ones; measured on a real server."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from tests.conftest import write_models_yaml
from tests.figures import figure
from tests.load import Ask, Connection, percentile, process
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIDE = 3072  # 3072x3072 pixels are 56 % of a model's limit by default


@pytest.fixture(scope="module")
def config(vaes: dict[str, LocalVae], tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("sd", "flux", "hunyuan")
    models: dict[str, Any] = {name: {"repo": str(vaes[name].folder), "dtype": "float32"} for name in names}
    models["flux"]["preload"] = models["sd"]["preload"] = models["hunyuan"]["preload"] = True
    return write_models_yaml(tmp_path_factory.mktemp("fairness") / "models.yaml", models, "sd")


def large_decode(connection: http.client.HTTPConnection, **headers: str) -> None:
    ask = Ask.of((1, 16, SIDE // 8, SIDE // 8), model="flux", image_format="png")
    connection.request("POST", ask.path, ask.body, headers)


def large_encode(connection: http.client.HTTPConnection, **headers: str) -> None:
    path = f"/flux/encode?shape=1,3,{SIDE},{SIDE}&dtype=uint8"
    connection.request("POST", path, np.zeros((3, SIDE, SIDE), "uint8").tobytes(), headers)


def seconds_until_idle(worker: psutil.Process, since: float) -> float:
    """Wait until the worker is idle for a second, and return how long after `since` it was last busy, in seconds."""
    last_busy = since
    while time.monotonic() < last_busy + 1:
        before = sum(worker.cpu_times()[:2])
        time.sleep(0.1)
        if sum(worker.cpu_times()[:2]) - before > 0.02:
            last_busy = time.monotonic()
        assert last_busy < since + PATIENCE_S, "it never ended"
    return last_busy - since


def busiest(pid: int) -> psutil.Process:
    """Return the child process that uses most CPU time now."""
    children = psutil.Process(pid).children(recursive=True)
    before = {child: sum(child.cpu_times()[:2]) for child in children}
    time.sleep(0.5)
    return max(children, key=lambda child: sum(child.cpu_times()[:2]) - before[child])


def seconds_after_a_client_left(config: Path, begin: Callable[..., None]) -> float:
    """Return how long the worker goes on computing after its client has left, in seconds. begin: sends the request."""
    with process(config, "--threads", "1") as (url, server), Connection(url) as other:
        assert other.ask(Ask.of((1, 4, 8, 8))).status == 200
        client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
        begin(client)
        until(lambda: other.waiting() == 1)
        worker = busiest(server.pid)
        time.sleep(1)
        client.close()
        seconds = seconds_until_idle(worker, time.monotonic())
        with Connection(url) as another:
            assert another.ask(Ask.of((1, 4, 8, 8))).status == 200
    return seconds


def seconds_after_a_deadline(config: Path) -> float:
    with process(config, "--threads", "1") as (url, server):
        client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
        large_encode(client, **{"X-Request-Timeout": "3"})
        time.sleep(1)
        worker = busiest(server.pid)
        assert client.getresponse().status == 504
        client.close()
        return seconds_until_idle(worker, time.monotonic())


def test_the_device_is_free_soon_after_nobody_waits(config: Path) -> None:
    decode, encode = (seconds_after_a_client_left(config, begin) for begin in (large_decode, large_encode))
    deadline = seconds_after_a_deadline(config)
    figure(
        "time until the device is free after the last client left",
        f"{SIDE}x{SIDE} on one thread: {decode:.1f} s after the client of a decode left, {encode:.1f} s after that of an "
        f"encode, {deadline:.1f} s after the deadline of an encode",
    )


def test_small_images_do_not_wait_for_a_long_video(config: Path) -> None:
    video = Ask.of((1, 16, 65, 16, 16), model="hunyuan", output_type="mp4")  # 257 frames of 128x128
    small = Ask.of((1, 4, 8, 8), image_format="png")
    with process(config) as (url, _), Connection(url) as client:
        expected = client.ask(small).body
        alone = [client.ask(small).seconds for _ in range(50)]
        told: list[Any] = []

        def watch() -> None:
            with suppress(OSError), Connection(url) as watcher:
                told.append(watcher.ask(video))

        watching = threading.Thread(target=watch)
        watching.start()
        until(lambda: client.waiting() == 1)
        beside = []
        while not told and len(beside) < 2000:
            answer = client.ask(small)
            assert answer.body == expected
            beside.append(answer.seconds)
            time.sleep(0.02)
        watching.join()
        assert told[0].status == 200
        assert len(beside) > 3, "the video was done too soon to compare with"
    figure(
        "a small image beside a video of 257 frames",
        f"p99 of {len(beside)} requests {percentile(beside, 99):.0f} ms, without the video {percentile(alone, 99):.0f} ms; "
        f"the video took {told[0].seconds:.1f} s",
    )


HOSTILE = {
    "a shape of 16 million dimensions": b'{"inputs":"AAAA","parameters":{"shape":[' + b"1," * (16 << 20) + b"1]}}",
    "42 million empty objects": b'{"x":[' + b"{}," * (42 << 20) + b'{}],"inputs":"AAAA"}',
    "base64 in words of two letters": b'{"inputs":"' + b"AA " * (11 << 20) + b'"}',
    "honest base64": b'{"inputs":"' + b"AAAA" * (8 << 20) + b'"}',
}


def test_liveness_does_not_wait_for_any_body(config: Path) -> None:
    seconds: list[float] = []
    with process(config) as (url, server), Connection(url) as probe:
        probe.get("/health/live")
        statuses = []

        def attack() -> None:
            for body in HOSTILE.values():
                client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
                client.request("POST", "/?dtype=float32", body, {"Content-Type": "application/json"})
                statuses.append(client.getresponse().status)
                client.close()

        attacking = threading.Thread(target=attack)
        attacking.start()
        while attacking.is_alive():
            started = time.perf_counter()
            assert json.loads(probe.get("/health/live")) == {"status": "alive"}
            seconds.append(time.perf_counter() - started)
            time.sleep(0.002)
        attacking.join()
        peak = psutil.Process(server.pid).memory_info().rss
    assert all(400 <= status < 500 for status in statuses), statuses
    figure(
        "liveness beside hostile bodies",
        f"{len(HOSTILE)} JSON bodies of {min(map(len, HOSTILE.values())) >> 20} to "
        f"{max(map(len, HOSTILE.values())) >> 20} MiB: p99 of {len(seconds)} probes {percentile(seconds, 99):.0f} ms, "
        f"the front process held {peak >> 20} MiB after them",
    )
