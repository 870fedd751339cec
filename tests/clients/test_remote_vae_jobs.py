"""RemoteVAE with `jobs=True`: short requests, one decode after a lost connection, and no work that nobody waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from remote_vae import RemoteVAE, RemoteVAEError, Timeout
from safetensors.torch import save_file

from server.engine.runner import Runner
from server.errors import QueueFull
from tests.clients.scripted import LATE, LOST, Proxy
from tests.conftest import REPOSITORY, Serve
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def url(serve: Serve, vaes: dict[str, LocalVae]) -> str:
    return serve({"hunyuan": {"repo": str(vaes["hunyuan"].folder), "dtype": "float32"}})


@pytest.fixture
def latents(vaes: dict[str, LocalVae]) -> torch.Tensor:
    return vaes["hunyuan"].latents(2, 4, 6)


@pytest.fixture
def expected(vaes: dict[str, LocalVae], latents: torch.Tensor) -> torch.Tensor:
    return vaes["hunyuan"].decode(latents).clamp(-1, 1)


def jobs_of(url: str) -> float:
    """How many jobs the server has."""
    text = requests.get(url + "metrics", timeout=PATIENCE_S).text
    return float(next(line for line in text.splitlines() if line.startswith("vae_jobs ")).split()[1])


def decoded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """At most half a level apart, by the rounding to bytes."""
    torch.testing.assert_close(found, expected, atol=0.51 / 127.5, rtol=0)


def in_a_thread(vae: RemoteVAE, latents: torch.Tensor) -> Future[torch.Tensor]:
    """The sample, later."""
    return ThreadPoolExecutor(1).submit(lambda: vae.decode(latents).sample)


def test_no_request_is_as_long_as_the_decode(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, expected: torch.Tensor, held_device: threading.Event
) -> None:
    between, address = proxy
    told: list[tuple[str, float, float | None]] = []
    vae = RemoteVAE(address, jobs=True, progress=lambda *about: told.append(about))
    between.limit_s = 5
    began = time.monotonic()
    sample = in_a_thread(vae, latents)
    until(lambda: any(stage == "compute" and 0 < share < 1 for stage, share, _ in told), "progress")
    until(lambda: time.monotonic() - began > 2 * between.limit_s, "a time beyond the limit of the proxy")
    held_device.set()
    decoded(sample.result(PATIENCE_S), expected)
    shares = [share for stage, share, _ in told if stage == "compute"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert jobs_of(url) == 0, "the server need not keep the answer"


def test_a_lost_connection_does_not_decode_twice(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, expected: torch.Tensor, held_device: threading.Event
) -> None:
    between, address = proxy
    vae = RemoteVAE(address, jobs=True)
    between.script += [LOST]
    sample = in_a_thread(vae, latents)
    until(lambda: len(between.jobs) == 2, "the second request")
    held_device.set()
    decoded(sample.result(PATIENCE_S), expected)
    assert len(set(between.jobs)) == 1
    assert len({headers["Idempotency-Key"] for headers in between.posts}) == 1


@pytest.mark.parametrize("act", [(429, "0"), (429, None), (502, None), (503, "0"), (503, None), (504, None), LOST])
@pytest.mark.parametrize("question", ["polls", "results"])
def test_a_proxy_that_fails_once_does_not_end_the_job(
    proxy: tuple[Proxy, str],
    latents: torch.Tensor,
    expected: torch.Tensor,
    act: tuple[int, str | None] | str,
    question: str,
) -> None:
    between, address = proxy
    vae = RemoteVAE(address, jobs=True)
    getattr(between, question).append(act)
    decoded(vae.decode(latents).sample, expected)
    assert not getattr(between, question)
    assert len(between.posts) == 1


@pytest.mark.parametrize("question", ["polls", "results"])
def test_a_busy_server_is_asked_for_a_job_more_often_than_retries(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor, question: str
) -> None:
    between, address = proxy
    vae = RemoteVAE(address, jobs=True, retries=1)
    getattr(between, question).extend([(503, "0")] * 9)
    decoded(vae.decode(latents).sample, expected)
    assert not getattr(between, question)
    assert len(between.posts) == 1


def test_a_job_whose_questions_fail_too_often_is_found_again(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, expected: torch.Tensor
) -> None:
    between, address = proxy
    vae = RemoteVAE(address, jobs=True, retries=1, save_latents=None)
    between.results += [(502, None)] * 3
    decoded(vae.decode(latents).sample, expected)
    assert len(between.posts) == 1
    vae._pool.retries = 0
    between.results += [(502, None)]
    with pytest.raises(RemoteVAEError, match="answered 502"):
        vae.decode(latents)
    assert jobs_of(url) == 0, "nobody will ask for it"


def test_a_job_that_failed_because_the_server_was_busy_is_sent_again_as_another_one(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    between, address = proxy
    vae = RemoteVAE(address, jobs=True, retries=0)
    busy, compute = [QueueFull("busy", 0)] * 2, Runner._compute

    def refuses(self: Any, *arguments: Any) -> Any:
        if busy:
            raise busy.pop()
        return compute(self, *arguments)

    monkeypatch.setattr(Runner, "_compute", refuses)
    decoded(vae.decode(latents).sample, expected)
    assert len({headers["Idempotency-Key"] for headers in between.posts}) == len(between.posts) == 3


def test_a_job_that_the_server_forgot_is_sent_again(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor, held_device: threading.Event
) -> None:
    between, address = proxy
    sample = in_a_thread(RemoteVAE(address, jobs=True), latents)
    until(lambda: len(between.jobs) == 1, "the job")
    assert requests.delete(between.jobs[0], timeout=PATIENCE_S).ok
    until(lambda: len(between.jobs) == 2, "another job")
    held_device.set()
    decoded(sample.result(PATIENCE_S), expected)


def test_a_server_without_jobs_answers_at_once(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor
) -> None:
    between, address = proxy
    between.hidden.add("Prefer")
    decoded(RemoteVAE(address, jobs=True).decode(latents).sample, expected)
    assert between.jobs == []


def test_the_error_of_a_job_is_that_of_the_request(url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    vae = RemoteVAE(url, jobs=True, save_latents=tmp_path)
    with pytest.raises(RemoteVAEError, match=r"answered 400: .* NaN") as raised:
        vae.decode(torch.full((1, 16, 2, 4, 6), torch.nan))
    assert raised.value.status == 400
    assert raised.value.latents_file
    assert jobs_of(url) == 0


def test_the_timeout_ends_the_job(
    url: str, latents: torch.Tensor, held_device: threading.Event, tmp_path: Path
) -> None:
    vae = RemoteVAE(url, jobs=True, save_latents=tmp_path)
    vae._pool.timeout = Timeout(total=3)
    with pytest.raises(RemoteVAEError, match=r"did not answer within 3 s|504: .*was not done"):
        vae.decode(latents)
    until(lambda: jobs_of(url) == 0, "the end of the job")
    assert not held_device.is_set()


def test_an_exception_of_the_callback_ends_the_job(
    url: str, latents: torch.Tensor, held_device: threading.Event
) -> None:
    class Enough(Exception):
        pass

    def progress(stage: str, done: float, total: Any) -> None:
        if stage == "compute" and done > 0:
            raise Enough

    vae = RemoteVAE(url, jobs=True, progress=progress)
    with pytest.raises(Enough):
        vae.decode(latents)
    assert jobs_of(url) == 0
    assert not held_device.is_set()


def test_an_exception_between_two_attempts_ends_the_job(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, held_device: threading.Event
) -> None:
    """Ctrl-C raises one there too."""
    between, address = proxy

    def progress(stage: str, done: float, total: Any) -> None:
        if stage == "wait":
            assert jobs_of(url) == 1
            raise KeyboardInterrupt

    vae = RemoteVAE(address, jobs=True, progress=progress, retries=1)
    between.polls += [LOST] * 2
    with pytest.raises(KeyboardInterrupt):
        vae.decode(latents)
    assert jobs_of(url) == 0
    assert not held_device.is_set()


SCRIPT = """
import signal, sys
import remote_vae
from safetensors.torch import load_file

def on_interrupt(*_):
    print("interrupted", flush=True)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, on_interrupt)
remote_vae.CANCEL_S = float(sys.argv[3])
vae = remote_vae.RemoteVAE(sys.argv[1], jobs=True, progress=lambda stage, *_: print(stage, flush=True))
vae.decode(load_file(sys.argv[2])["latents"])
"""


@contextmanager
def client_of(address: str, latents: torch.Tensor, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that decodes, and prints each stage and `interrupted`."""
    save_file({"latents": latents}, folder / "latents.safetensors")
    command = [sys.executable, "-c", SCRIPT, address, str(folder / "latents.safetensors"), str(PATIENCE_S)]
    where = REPOSITORY / "clients" / "remote_vae"
    with subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        try:
            yield client
            _, log = client.communicate(timeout=PATIENCE_S)
            assert "KeyboardInterrupt" in log
        finally:
            client.kill()


def wait_for(line: str, client: subprocess.Popen[str]) -> None:
    """Read the output of a process until it has printed a line."""
    assert client.stdout
    while (found := client.stdout.readline()) != f"{line}\n":
        assert found, f"it never printed {line}"


@pytest.mark.slow
def test_ctrl_c_ends_the_job(url: str, latents: torch.Tensor, held_device: threading.Event, tmp_path: Path) -> None:
    with client_of(url, latents, tmp_path) as client:
        wait_for("compute", client)
        assert jobs_of(url) == 1
        client.send_signal(signal.SIGINT)
    assert jobs_of(url) == 0
    assert not held_device.is_set()


@pytest.mark.slow
def test_ctrl_c_ends_a_job_that_the_client_does_not_know_yet(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, held_device: threading.Event, tmp_path: Path
) -> None:
    between, address = proxy
    between.script += [LATE]
    with client_of(address, latents, tmp_path) as client:
        until(lambda: jobs_of(url) == 1, "the job")
        client.send_signal(signal.SIGINT)
        wait_for("interrupted", client)
        between.released.set()
    assert jobs_of(url) == 0
    assert not held_device.is_set()
