"""Clients that hold something and give nothing: what they hold never keeps others out, and honest slow ones are served."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from tests.conftest import Serve
from tests.figures import figure
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until
from tests.web.raw import QUERY, Connection, connected, head
from tests.web.test_errors import gate
from tests.web.test_protocol import open_sockets
from tests.web.test_slow_clients import descriptors, small_buffers  # noqa: F401  # fixtures

BODY = np.zeros(256, "float32").tobytes()
LARGE = "shape=8,16,512,512&dtype=float16&output_type=pt"  # 64 MiB whose answer takes 1.6 GB


@pytest.fixture
def models(vaes: dict[str, LocalVae]) -> dict[str, Any]:
    limits = {"max_pixels": 1 << 26, "max_batch": 8}
    return {
        "sd": {"repo": str(vaes["sd"].folder), "dtype": "float32", "preload": True, "limits": limits},
        "flux": {"repo": str(vaes["flux"].folder), "dtype": "float32", "limits": limits},
    }


def decode(address: str, model: str = "", **options: Any) -> requests.Response:
    return requests.post(f"{address}{model}?{QUERY}", data=BODY, timeout=PATIENCE_S, **options)


def metric(address: str, name: str) -> float:
    lines = requests.get(address + "metrics", timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and not line.startswith("#"))


def silent(address: str, *parts: bytes) -> Iterator[Connection]:
    for part in parts:
        connection = Connection(address)
        connection.send(part)
        yield connection


def test_silent_connections_keep_nobody_out(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models)
    huge = head("POST", f"/flux?{LARGE}", f"Content-Length: {8 * 16 * 512 * 512 * 2}")
    forms = head("POST", "/", "Content-Type: application/json", f"Content-Length: {128 << 20}")
    refused = 0
    with ExitStack() as stack:
        for client in silent(address, huge, *[forms] * 8):
            stack.callback(client.socket.close)
        until(lambda: open_sockets(address) >= 9)
        for _ in range(40):
            refused += decode(address).status_code != 200
        assert metric(address, "vae_queue_bytes") == 0
    figure("429s caused by silent connections", f"{refused} of 40 requests beside 9 connections that send only a head")
    assert refused == 0


def test_trickling_bodies_give_way_to_whole_ones(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models, max_queue_mb=3, max_body_mb=8)
    upload = head("POST", "/encode", f"Content-Length: {4 << 20}")
    with ExitStack() as stack:
        slow = []
        for client in silent(address, upload + bytes(2 << 20)):
            stack.callback(client.socket.close)
            slow.append(client)
        until(lambda: metric(address, "vae_queue_bytes") == 2 << 20)
        time.sleep(1.2)  # a body that began just now is not given up
        honest = np.zeros((1, 3, 512, 512), "uint8").tobytes()
        sent = {"shape": "1,3,512,512", "dtype": "uint8"}
        answer = requests.post(address + "encode", honest, params=sent, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        told = slow[0].answer()
        assert (told.status, told.json()["code"]) == (429, "queue_full")
        assert "send the body faster" in told.json()["error"]


@pytest.mark.usefixtures("small_buffers")
def test_clients_that_do_not_read_hold_no_place(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models, max_queue=2)
    request = head("POST", "/?shape=1,4,64,64&dtype=float32&output_type=pt", "Content-Length: 65536") + bytes(65536)
    with ExitStack() as stack:
        for _ in range(6):
            client = Connection(address, receive_buffer=4096)
            stack.callback(client.socket.close)
            client.send(request)
            until(lambda: metric(address, "vae_inflight") + metric(address, "vae_queue_depth") == 0)
            assert decode(address).status_code == 200
        assert metric(address, "vae_queue_bytes") == 6 * 512 * 512 * 3 * 4


def test_idle_connections_give_way_and_health_is_always_answered(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models, max_connections=20)
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(address)) for _ in range(20)]
        for client in idle:
            client.send(b"P")
        until(lambda: open_sockets(address) >= 20)
        for _ in range(30):
            assert requests.get(address + "health/live", timeout=PATIENCE_S).status_code == 200
            assert decode(address).status_code == 200
        assert idle[0].rest() == b"", "the one that was idle for longest ends first"


def test_where_every_connection_works_only_probes_get_in(serve: Serve, models: dict[str, Any]) -> None:
    go = threading.Event()
    address = serve(models, engine=gate(go), max_connections=4)
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(decode, address) for _ in range(4)]
        until(lambda: open_sockets(address) >= 4)
        time.sleep(0.1)
        assert requests.get(address + "health", timeout=PATIENCE_S).status_code == 200
        assert requests.get(address + "health/live", timeout=PATIENCE_S).status_code == 200
        refused = decode(address)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
        go.set()
        assert [answer.result().status_code for answer in waiting] == [200] * 4


MIB = int(os.environ.get("VAE_TEST_SLOW_MIB", "3"))
RATE = 128 << 10


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("small_buffers")
def test_an_honest_client_on_a_slow_line_gets_all_of_its_answer(serve: Serve, models: dict[str, Any]) -> None:
    """Ten times longer than `send_timeout_s`, and longer than the deadline: its progress counts."""
    side = int((MIB * (1 << 20) / 12) ** 0.5) // 8 * 8
    address = serve(models, send_timeout_s=min(30, 0.8 * MIB), request_timeout_s=30)
    size = 12 * side * side
    shape = f"1,4,{side // 8},{side // 8}"
    body = bytes(4 * 4 * (side // 8) ** 2)
    with connected(address, receive_buffer=16 << 10) as client:
        client.send(
            head("POST", f"/?shape={shape}&dtype=float32&output_type=pt", f"Content-Length: {len(body)}") + body
        )
        client.socket.settimeout(PATIENCE_S)
        started, received = time.monotonic(), 0
        while received < size:
            data = client.socket.recv(RATE // 8)
            if not data:
                break
            received += len(data)
            time.sleep(max(0.0, started + received / RATE - time.monotonic()))
        seconds = time.monotonic() - started
    figure(
        "a slow honest reader",
        f"{size / 2**20:.1f} MiB at {RATE >> 10} KiB/s, all of it after {seconds:.0f} s"
        if received >= size
        else f"{received} of {size} bytes",
    )
    assert received >= size


@pytest.mark.usefixtures("small_buffers")
def test_a_truncated_answer_is_logged_and_counted_as_one(
    serve: Serve, models: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    address = serve(models, send_timeout_s=1)
    request = head("POST", "/?shape=1,4,128,128&dtype=float32&output_type=pt", "Content-Length: 262144") + bytes(262144)
    with caplog.at_level(logging.INFO), connected(address, receive_buffer=4096) as client:
        client.send(request)
        until(lambda: metric(address, 'vae_cancelled_total{stage="sending"}') == 1)
        until(lambda: any(record.__dict__.get("status") == 499 for record in caplog.records))
    assert metric(address, 'vae_requests_total{code="499",model="sd",route="decode"}') == 1
    assert any("cut off" in record.getMessage() for record in caplog.records)


def test_bodies_of_clients_that_left_stay_counted_until_they_are_freed(
    serve: Serve, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go, calls = threading.Event(), threading.Event(), []

    def slow(*_: Any) -> Any:
        calls.append(1)
        entered.set()
        go.wait(PATIENCE_S)
        raise ZeroDivisionError

    monkeypatch.setattr("server.contract.header_of", slow)
    address = serve(models)
    upload = head("POST", "/encode", f"Content-Length: {1 << 20}") + bytes(1 << 20)
    for _ in range(6):
        with connected(address) as client:
            client.send(upload)
            assert entered.wait(PATIENCE_S)
            time.sleep(0.05)
    until(lambda: open_sockets(address) <= 2)
    until(lambda: metric(address, "vae_queue_bytes") == len(calls) << 20)
    assert len(calls) == 2, "as many as there are threads"
    go.set()
    until(lambda: metric(address, "vae_queue_bytes") == 0)
    assert len(calls) == 2, "what waited for a thread left with its client"


def test_refusals_are_counted_under_their_model_and_logged_with_their_code(
    serve: Serve, models: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    go = threading.Event()
    address = serve(models, engine=gate(go), max_queue=1)
    with ThreadPoolExecutor(2) as clients, caplog.at_level(logging.INFO):
        running = clients.submit(decode, address)
        until(lambda: metric(address, "vae_inflight") == 1)
        assert decode(address, "flux").status_code == 429
        go.set()
        assert running.result().status_code == 200
        until(lambda: sum(record.getMessage() == "answered" for record in caplog.records) >= 2)
    assert metric(address, 'vae_requests_total{code="429",model="flux",route="decode"}') == 1
    assert metric(address, 'vae_rejected_total{model="flux",reason="queue_full"}') == 1
    assert metric(address, "vae_request_duration_seconds_created") == 0
    lines = [record.__dict__ for record in caplog.records if record.getMessage() == "answered"]
    refused = next(line for line in lines if line.get("status") == 429)
    done = next(line for line in lines if line.get("status") == 200)
    assert refused["code"] == "queue_full"
    assert (done["bytes_in"], done["size"]) == (1024, "64x64")
    assert done["bytes_out"] > 500
    assert done["queue_ms"] >= 0


def test_a_model_that_does_not_load_is_told_in_milliseconds_and_keeps_nobody_out(
    serve: Serve, models: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, vaes: dict[str, LocalVae]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in vaes["sd"].folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    weights = bad / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    address = serve({**models, "bad": {"repo": str(bad)}})
    caplog.clear()
    first = decode(address, "bad")
    assert (first.status_code, first.json()["code"]) == (503, "model_unavailable")
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert not lines[0].exc_info
    seconds: list[float] = []

    def ask(route: str) -> requests.Response:
        started = time.perf_counter()
        answer = decode(address, route)
        seconds.append(time.perf_counter() - started)
        return answer

    with ThreadPoolExecutor(16) as clients:
        refused = list(clients.map(ask, ["bad"] * 64))
        good = [decode(address).status_code for _ in range(8)]
    assert {answer.status_code for answer in refused} == {503}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert good == [200] * 8
    assert requests.get(address + "health", timeout=PATIENCE_S).json() == {"status": "ready", "failed_models": ["bad"]}
    figure(
        "refused requests of a model that does not load",
        f"{len(refused)} of 64 at once, each 503 with Retry-After, p99 {1e3 * np.percentile(seconds, 99):.0f} ms; "
        "8 of 8 requests to another model answered",
    )


def test_a_client_that_pipelined_another_request_and_left_is_noticed(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models)
    large = "/flux?shape=1,16,384,384&dtype=float32&output_type=pt"
    body = bytes(16 * 384 * 384 * 4)
    with connected(address) as client:
        client.send(head("POST", large, f"Content-Length: {len(body)}") + body + head("GET", "/health"))
        until(lambda: metric(address, "vae_inflight") == 1)
    until(lambda: metric(address, 'vae_cancelled_total{stage="running"}') == 1)
    until(lambda: metric(address, "vae_queue_bytes") == 0)


def test_a_body_in_chunks_of_a_byte_is_refused(serve: Serve, models: dict[str, Any]) -> None:
    """Each chunk costs the event loop some microseconds, and a megabyte would be 170,000 of them.

    How many are read at a time is the kernel's choice: of fewer, the body's length is the mistake.
    """
    address = serve(models)
    with connected(address) as client:
        client.send(head("POST", f"/?{QUERY}", "Transfer-Encoding: chunked") + b"1\r\na\r\n" * 60_000)
        told = client.answer()
    assert (told.status, told.json()["code"]) in ((400, "malformed_request"), (400, "wrong_length"))
    few = b"".join(b"10\r\n" + BODY[start : start + 16] + b"\r\n" for start in range(0, 1024, 16))
    with connected(address) as client:
        client.send(head("POST", f"/?{QUERY}", "Transfer-Encoding: chunked") + few + b"0\r\n\r\n")
        assert client.answer().status == 200


def test_a_query_of_thousands_of_parameters_is_refused(serve: Serve, models: dict[str, Any]) -> None:
    address = serve(models)
    told = requests.post(f"{address}?{QUERY}" + "&a=b" * 5000, data=BODY, timeout=PATIENCE_S)
    assert (told.status_code, told.json()["code"]) == (400, "bad_request")
    assert "more than 256 parameters" in told.json()["error"]
