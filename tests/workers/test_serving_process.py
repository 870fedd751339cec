"""`serve` as a process among others: its keys, its signals, its open files."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import requests
from PIL import Image

from tests.inputs.mp4 import H264, source, write
from tests.load import Ask, Told, all_of, process
from tests.waiting import PATIENCE_S, until
from tests.web.raw import QUERY, connected, head

pytestmark = pytest.mark.slow

ENDINGS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(scope="module")
def config(models_yaml: Path) -> Path:
    return models_yaml


@pytest.mark.parametrize("name", ["VAE_SERVER_API_KEY", "vae_server_api_key"])
def test_no_child_process_has_the_keys(config: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "secret-1, secret-2")
    with process(config) as (url, server):
        assert requests.get(url + "models", timeout=PATIENCE_S).status_code == 401
        assert requests.get(url + "models", headers={"X-API-Key": "secret-2"}, timeout=PATIENCE_S).ok
        children = psutil.Process(server.pid).children(recursive=True)
        assert len(children) >= 2, "the fork server and the worker"
        for child in children:
            assert b"secret" not in Path(f"/proc/{child.pid}/environ").read_bytes(), child.cmdline()


def has_torch(pid: int) -> bool:
    """Whether a process has loaded torch's library."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_the_front_process_never_loads_torch_whatever_it_is_asked(config: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    with process(config) as (url, server):
        for path in ("", "health", "health/live", "metrics", "models", "openapi.json", "no/such/route"):
            requests.get(url + path, timeout=PATIENCE_S)
        latents = {"shape": [1, 4, 8, 8], "dtype": "float32"}
        for parameters in ({}, {"image_format": "png"}, {"output_type": "pt"}, {"do_scaling": "true"}):
            assert requests.post(url, params=latents | parameters, data=bytes(1024), timeout=PATIENCE_S).ok
        assert requests.post(url + "encode", data=image.read_bytes(), timeout=PATIENCE_S).ok
        assert not requests.post(url, params=latents, data=b"short", timeout=PATIENCE_S).ok
        children = psutil.Process(server.pid).children(recursive=True)
        assert any(has_torch(child.pid) for child in children), "the worker"
        assert not has_torch(server.pid)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_usual_signal_to_the_group_drains(
    config: Path, ending: signal.Signals, direction: str, tmp_path: Path
) -> None:
    """As a closed terminal or Ctrl-C sends it: to the server, its fork server and its worker, while ffmpeg works."""
    video = Ask.of((1, 16, 5, 64, 64), model="hunyuan", output_type="mp4")
    if direction == "encode":
        # Larger ones would take gigabytes: the encoder of diffusers has a mask of all pairs of positions.
        written = write(tmp_path / "video.mp4", *source(0.36, size="848x480"), *H264)
        video = Ask("/hunyuan/encode", written.read_bytes())
    with process(config, "--drain-timeout-s", str(PATIENCE_S), prefix=("setsid",)) as (url, server):
        told: list[Told] = []
        client = threading.Thread(target=lambda: told.extend(all_of(url, [video], 1)))
        client.start()
        until(lambda: has_ffmpeg(server.pid) or bool(told), "ffmpeg", pause_s=0)
        os.killpg(server.pid, ending)
        client.join()
        assert [answer.status for answer in told] == [200], told
        assert server.wait(PATIENCE_S) == 0


def has_ffmpeg(server: int) -> bool:
    """Whether it has become ffmpeg, and is no longer its launcher."""
    for child in psutil.Process(server).children(recursive=True):
        with suppress(OSError):
            if Path(f"/proc/{child.pid}/exe").readlink().name.startswith("ffmpeg"):
                return True
    return False


def test_nohup_keeps_a_server_from_ending_with_its_terminal(config: Path) -> None:
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process(config) as (url, server):
            server.send_signal(signal.SIGHUP)
            assert all_of(url, [Ask.of((1, 4, 8, 8))], 1)[0].status == 200
            assert server.poll() is None
    finally:
        signal.signal(signal.SIGHUP, usual)


def limited(files: int) -> tuple[str, ...]:
    return "bash", "-c", f'ulimit -n {files}; exec "$@"', "bash"


def test_with_few_open_files_every_request_has_an_answer(config: Path) -> None:
    """100 clients stay, and each is told to send its body or that there are too many."""
    log: list[str] = []
    patient = "--body-timeout-s", str(PATIENCE_S)
    with process(config, *patient, prefix=limited(64), log=log) as (url, _), ExitStack() as stack:
        (line,) = log
        most = int(re.search(r"max_connections is (\d+) instead of 800, because .* only 64 open files", line)[1])
        body = bytes(4 * 4 * 8 * 8)
        start = head("POST", f"/?{QUERY}", f"Content-Length: {len(body)}", "Expect: 100-continue")
        served = []
        for _ in range(100):
            client = stack.enter_context(connected(url))
            client.send(start)
            if client.socket.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 100":
                served.append(client)
                continue
            answer = client.answer()
            assert (answer.status, answer.json()["code"]) == (503, "too_many_connections")
        assert most <= len(served) < 64
        for client in served:
            client.send(body)
            assert client.answer().status == 200, "there are files left to decode"


def test_a_soft_limit_of_open_files_is_raised_as_far_as_it_may(config: Path) -> None:
    """As a login shell sets it: 1024 of a million, and connections are more."""
    log: list[str] = []
    prefix = "bash", "-c", 'ulimit -S -n 64; exec "$@"', "bash"
    with process(config, prefix=prefix, log=log) as (url, server):
        assert log == []
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0] >= 800
        assert requests.get(url + "health", timeout=PATIENCE_S).ok
