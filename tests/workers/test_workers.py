"""The worker process: killed, hung, out of memory, overflowing. The front process lives and every client is answered."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch

from server.config import Settings, load_settings
from server.metrics import Metrics
from server.workers.process import ProcessEngine
from tests.conftest import running, write_models_yaml
from tests.figures import figure
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until
from tests.web.test_errors import LEAKS
from tests.workers import faults

BINARY = {"Content-Type": "tensor/binary"}
KILLS = int(20 * float(os.environ.get("VAE_TEST_SCALE", "1")))


class Served:
    """A server whose worker has faults."""

    def __init__(self, url: str, folder: Path, engine: ProcessEngine) -> None:
        self.url, self.folder, self.engine = url, folder, engine

    def post(
        self, first: float = 0.5, side: int = 8, model: str = "", patience_s: float = PATIENCE_S, headers: Any = None
    ) -> requests.Response:
        latents = np.random.default_rng(side).normal(size=(1, 4, side, side)).astype("float32")
        latents[0, 0, 0, 0] = first
        sent = {"shape": latents.shape, "dtype": "float32", "image_format": "png"}
        return requests.post(
            self.url + model,
            params=sent,
            data=latents.tobytes(),
            headers={**BINARY, **(headers or {})},
            timeout=patience_s,
        )

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", requests.get(self.url + "metrics", timeout=300).text, re.M)
        return float(found[1]) if found else 0.0

    def until(self, holds: Callable[[], bool]) -> None:
        until(holds, pause_s=0)

    def decodes(self) -> int:
        counted = self.folder / "decodes"
        return len(counted.read_text()) if counted.exists() else 0

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def close_gate(self) -> None:
        (self.folder / "open").unlink(missing_ok=True)


Start = Callable[..., Served]


@pytest.fixture
def start(vaes: dict[str, LocalVae], tmp_path: Path) -> Iterator[Start]:
    stops = []

    def begin(worker: str = "tests.workers.faults", device: str = "cpu", **flags: Any) -> Served:
        models = {"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32", "preload": True}}
        models["half"] = {"repo": str(vaes["sd"].folder), "dtype": "bfloat16"}
        settings = load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "sd"), **flags)
        engines: list[ProcessEngine] = []

        def engine(settings: Settings, metrics: Metrics) -> ProcessEngine:
            engines.append(ProcessEngine(settings, device, metrics, worker=worker))
            return engines[-1]

        context = running(settings, engine)
        url = context.__enter__()
        stops.append(context)
        return Served(url, tmp_path, engines[0])

    yield begin
    for context in stops:
        context.__exit__(None, None, None)


def test_a_killed_worker_loses_nothing(start: Start) -> None:
    served, back_s = start(), []
    served.open_gate()
    expected = served.post(faults.WAIT)
    with ThreadPoolExecutor(8) as clients:
        for _ in range(KILLS):
            served.close_gate()
            answers = [clients.submit(served.post, faults.WAIT) for _ in range(6)]
            served.until(lambda: served.metric("vae_inflight") + served.metric("vae_queue_depth") == 6)
            killed, pid = time.monotonic(), served.engine.pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            served.until(lambda pid=pid: served.engine.is_alive and served.engine.pid != pid)
            back_s.append(time.monotonic() - killed)
            served.open_gate()
            for answer in answers:
                assert answer.result().content == expected.content
    assert served.metric('vae_worker_restarts_total{cause="signal_9"}') == KILLS
    figure(
        "kill -9 of the worker mid-request",
        f"{KILLS} kills, 0 of {6 * KILLS} requests lost; ready again after {np.median(back_s):.2f} s (median)",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would choose the CUDA device")
@pytest.mark.parametrize("has_driver", [True, False])
def test_where_cuda_is_unusable_in_forked_processes_workers_are_new_ones(
    start: Start, tmp_path: Path, has_driver: bool
) -> None:
    """Without a driver there is no CUDA device to use, so that forked processes will do."""
    (tmp_path / "front").write_text(str(os.getpid()))
    if not has_driver:
        (tmp_path / "no-driver").touch()
    served = start("tests.workers.unusable_fork", "auto")
    expected = served.post(0.5)
    assert expected.status_code == requests.codes.ok
    assert "vae_worker_restarts_total{" not in requests.get(served.url + "metrics", timeout=PATIENCE_S).text
    pid = served.engine.pid
    assert pid
    assert (psutil.Process(pid).ppid() == os.getpid()) == has_driver
    os.kill(pid, signal.SIGKILL)
    served.until(lambda: served.engine.is_alive and served.engine.pid != pid)
    assert served.post(0.5).content == expected.content


def test_both_directions_share_a_worker_and_come_back_after_its_death(start: Start, vaes: dict[str, LocalVae]) -> None:
    served = start()
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype("float32")
    with torch.no_grad():
        expected = vaes["sd"].module.encode(torch.from_numpy(pixels)).latent_dist.mode().numpy()

    def encode() -> np.ndarray:
        sent = {"shape": pixels.shape, "dtype": "float32"}
        answer = requests.post(served.url + "encode", pixels.tobytes(), params=sent, timeout=300)
        return np.frombuffer(answer.content, "float32").reshape(expected.shape)

    def holds() -> tuple[Any, Any]:
        models = requests.get(served.url + "models", timeout=300).json()["models"]
        model = next(model for model in models if model["name"] == "sd")
        return model.get("decoder"), model.get("encoder")

    picture = served.post().content
    for _ in range(2):
        with ThreadPoolExecutor(12) as clients:
            encoded = [clients.submit(encode) for _ in range(6)]
            computed = [clients.submit(served.post) for _ in range(6)]
        assert all(np.abs(answer.result() - expected).max() <= 1e-4 for answer in encoded)
        assert all(answer.result().content == picture for answer in computed)
        assert holds() == ("exact", "exact")
        pid = served.engine.pid
        served.engine.kill("the test wants it")
        served.until(lambda pid=pid: served.engine.pid != pid and holds() == ("exact", "exact"))


def test_while_no_worker_lives_new_requests_and_health_are_503(start: Start) -> None:
    served = start()
    served.engine._worker = "tests.no_such_worker"
    assert served.engine.pid
    os.kill(served.engine.pid, signal.SIGKILL)
    served.until(lambda: not served.engine.is_alive)
    for refused in (served.post(), requests.get(served.url + "health", timeout=300)):
        assert refused.status_code == 503
        assert "restarting" in refused.json()["error"]
        assert refused.headers["retry-after"]
    assert requests.get(served.url + "health/live", timeout=300).ok
    served.engine._worker = "tests.workers.faults"
    served.until(lambda: requests.get(served.url + "health", timeout=300).ok)
    assert served.post().ok


def test_a_poisonous_request_is_500_after_two_tries_and_the_rest_goes_on(start: Start) -> None:
    served = start()

    def come_again() -> requests.Response:
        """Who comes just when no worker lives is told to."""
        while (answer := served.post()).status_code == 503:
            time.sleep(0.1)
        return answer

    with ThreadPoolExecutor(8) as clients:
        poison = clients.submit(served.post, faults.CRASH)
        others = [clients.submit(come_again) for _ in range(6)]
        answered = poison.result()
        assert [other.result().status_code for other in others] == [200] * 6
    assert answered.status_code == 500
    assert answered.json()["code"] == "worker_crashed"
    assert served.metric('vae_worker_restarts_total{cause="signal_9"}') == 2


def test_a_request_whose_worker_died_once_is_answered(start: Start) -> None:
    served = start()
    for fault, cause in ((faults.CRASH_ONCE, "signal_9"), (faults.LOST_DEVICE_ONCE, "exit_70")):
        assert served.post(fault).ok
        assert served.metric(f'vae_worker_restarts_total{{cause="{cause}"}}') == 1


def test_a_hung_worker_is_ended_past_the_deadline_and_those_who_wait_are_served(start: Start) -> None:
    served = start(hang_timeout_s=1)
    with ThreadPoolExecutor(8) as clients:
        hung = clients.submit(served.post, faults.HANG, headers={"X-Request-Timeout": "1"})
        served.until(lambda: served.metric("vae_inflight") == 1)
        others = [clients.submit(served.post, side=16) for _ in range(3)]
        assert hung.result().status_code == 504
        assert [other.result().status_code for other in others] == [200] * 3


def test_a_model_whose_load_ends_the_worker_is_500_and_no_loop(start: Start) -> None:
    served = start()
    (served.folder / "load-kills").touch()
    answered = served.post(model="half")
    assert (answered.status_code, answered.json()["code"]) == (500, "worker_crashed")
    (served.folder / "load-kills").unlink()
    served.until(lambda: served.engine.is_alive)
    assert served.post(model="half").ok
    assert served.post().ok


def test_a_client_with_little_patience_harms_nobody(start: Start) -> None:
    served = start()
    pid = served.engine.pid
    with ThreadPoolExecutor(1) as clients:
        impatient = clients.submit(served.post, faults.WAIT, headers={"X-Request-Timeout": "0.2"})
        assert impatient.result().status_code == 504
        served.open_gate()
        assert served.post().ok
    assert served.engine.pid == pid


def test_a_worker_that_freezes_before_it_starts_is_replaced(start: Start) -> None:
    served = start(hang_timeout_s=0.5)
    assert served.engine.pid
    os.kill(served.engine.pid, signal.SIGSTOP)
    assert served.post().ok


def test_out_of_memory_walks_down_and_ends_in_413(start: Start) -> None:
    served = start()
    expected = served.post(faults.MEMORY_TWICE + 100).content
    assert served.post(faults.MEMORY_ONCE).ok
    assert served.metric('vae_oom_total{step="free_caches"}') == 1
    assert served.post(faults.MEMORY_TWICE).ok
    assert served.metric('vae_oom_total{step="smallest_bands"}') == 1
    refused = served.post(faults.MEMORY_ALWAYS)
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large_for_device")
    assert served.post(faults.MEMORY_TWICE + 100).content == expected


def test_one_out_of_memory_in_a_batch_does_not_fail_the_others(start: Start) -> None:
    served = start()
    expected = served.post(0.25).content
    with ThreadPoolExecutor(8) as clients:
        first = [clients.submit(served.post, faults.WAIT, side=16) for _ in range(2)]
        served.until(lambda: served.metric("vae_inflight") == 1 and served.metric("vae_queue_depth") == 1)
        bad = clients.submit(served.post, faults.MEMORY_ALWAYS)
        good = [clients.submit(served.post, 0.25) for _ in range(4)]
        served.until(lambda: served.metric("vae_queue_depth") == 6)
        served.open_gate()
        assert bad.result().status_code == 413
        assert [answer.result().content for answer in good] == [expected] * 4
        assert all(answer.result().ok for answer in first)


def test_what_half_precision_overflows_is_decoded_in_float32_and_counted(start: Start) -> None:
    served = start()
    overflowed, single = served.post(faults.OVERFLOW, model="half"), served.post(faults.OVERFLOW, model="sd")
    assert overflowed.headers["x-vae-upcast"] == "float32"
    assert overflowed.content == single.content
    assert served.metric('vae_nonfinite_total{where="output"}') == 1
    assert "x-vae-upcast" not in served.post(model="half").headers


def test_bugs_and_full_disks_are_500_with_a_fixed_sentence(start: Start) -> None:
    served = start()
    for fault in (faults.BUG, faults.DISK_FULL):
        answer = served.post(fault)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert not LEAKS.search(answer.text)
    assert served.post().ok


def test_a_slow_render_does_not_keep_the_device(start: Start) -> None:
    served = start(render_threads=2)
    with ThreadPoolExecutor(2) as clients:
        slow = clients.submit(served.post, faults.SLOW_RENDER)
        served.until(lambda: served.decodes() >= 1)
        assert served.post().ok
        assert not slow.done()
        (served.folder / "rendered").touch()
        assert slow.result().ok


def test_a_client_that_leaves_while_it_waits_never_reaches_the_device(start: Start) -> None:
    served = start(max_queue=64)
    leaver = threading.Thread(target=served.post, args=(faults.WAIT,))
    leaver.start()
    served.until(lambda: served.decodes() == 1)

    def give_up() -> None:
        with pytest.raises(requests.ReadTimeout):
            served.post(side=16, patience_s=1)

    with ThreadPoolExecutor(20) as clients:
        for gone in [clients.submit(give_up) for _ in range(20)]:
            gone.result()
    served.until(lambda: served.metric("vae_queue_depth") == 0)
    served.open_gate()
    leaver.join()
    assert served.post().ok
    assert served.decodes() == 2
    assert served.metric('vae_cancelled_total{stage="queued"}') == 20


def test_a_model_that_is_not_used_is_unloaded_and_comes_back(start: Start) -> None:
    served = start(idle_unload_s=0.5)
    assert served.post().ok
    served.until(lambda: served.metric('vae_model_loaded{model="sd"}') == 0)
    served.until(lambda: served.post().ok and served.metric('vae_model_loaded{model="sd"}') == 1)


def test_the_least_recently_used_model_leaves_when_memory_is_short(start: Start) -> None:
    served = start(model_memory_mb=1)
    assert served.post().ok
    assert served.post(model="half").ok
    states = {
        model["name"]: model["state"] for model in requests.get(served.url + "models", timeout=300).json()["models"]
    }
    assert states["half"] == "loaded"


def give_up_after(served: Served, seconds: float, first: float, side: int = 8) -> None:
    with pytest.raises(requests.ReadTimeout):
        served.post(first, side=side, patience_s=seconds)


def test_work_ends_with_its_client(start: Start) -> None:
    served = start()
    pid = served.engine.pid
    give_up_after(served, 0.5, faults.STEPS)
    served.until(lambda: served.metric("vae_inflight") == 0)
    assert served.post(side=16).ok
    assert served.engine.pid == pid
    assert served.metric('vae_cancelled_total{stage="running"}') == 1


def test_work_ends_with_its_deadline(start: Start) -> None:
    served = start()
    pid = served.engine.pid
    assert served.post(faults.STEPS, headers={"X-Request-Timeout": "0.5"}).status_code == 504
    assert served.post(side=16).ok
    assert served.engine.pid == pid


def test_work_that_makes_progress_is_never_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.workers.process.BEAT_S", 0.1)  # as often it is asked for its progress
    served = start(hang_timeout_s=1)
    pid = served.engine.pid
    with ThreadPoolExecutor(1) as clients:
        slow = clients.submit(served.post, faults.STEPS)
        time.sleep(3)
        served.open_gate()
        assert slow.result().ok
    assert served.engine.pid == pid


def test_a_small_request_runs_between_the_steps_of_a_long_one(start: Start) -> None:
    served = start()
    with ThreadPoolExecutor(1) as clients:
        long = clients.submit(served.post, faults.STEPS)
        served.until(lambda: served.metric("vae_inflight") == 1)
        assert served.post(side=16).ok
        assert served.post(side=16, model="half").ok, "another model is loaded and runs meanwhile"
        assert not long.done()
        served.open_gate()
        assert long.result().ok


def test_a_worker_that_does_not_respond_is_ended_and_the_log_says_why(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.workers.process.BEAT_S", 0.1)
    served = start()
    pid = served.engine.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    assert served.post().ok
    assert served.engine.pid != pid
    assert any("ended: it did not respond for 1.5 s" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda served: os.kill(served.engine.pid, signal.SIGKILL), "another process killed it (signal 9)"),
        (lambda served: os.kill(served.engine.pid, signal.SIGSEGV), "it crashed (Segmentation fault, signal 11)"),
        (lambda served: served.post(faults.LOST_DEVICE_ONCE), "it exited with status 70"),
        (lambda served: served.post(faults.HANG), "a request made no progress for 1 s"),
    ],
    ids=["killed", "crashed", "lost its device", "hung"],
)
def test_the_log_says_how_a_worker_ended(
    start: Start, caplog: pytest.LogCaptureFixture, end: Callable[[Served], object], words: str
) -> None:
    served = start(hang_timeout_s=1)
    end(served)
    served.until(lambda: any(f"ended: {words}" in record.getMessage() for record in caplog.records))


def test_a_kill_by_the_kernel_for_lack_of_memory_is_told_from_one_by_a_process(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 0\noom_kill 3\n")
    monkeypatch.setattr("server.workers.endings.OOM_KILLS", (events,))
    served = start()
    events.write_text("low 0\noom 1\noom_kill 4\n")
    assert served.engine.pid
    os.kill(served.engine.pid, signal.SIGKILL)
    served.until(lambda: any("because memory ran out" in record.getMessage() for record in caplog.records))
