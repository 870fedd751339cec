"""A worker whose device is lost, and the time until the server answers again.

On a GPU a request makes the worker write outside of its memory, after which every call of CUDA in that process fails.
On a CPU the worker is killed instead.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import requests
import yaml

from benchmarks.gpu.lost_worker import ASSERTED, ILLEGAL
from benchmarks.gpu.report import OutOfTime, Report
from benchmarks.gpu.vaes import image_vae
from server.config import Settings, load_settings
from server.metrics import Metrics
from server.workers.process import ProcessEngine
from tests.conftest import running

WORKER = "benchmarks.gpu.lost_worker"
SIDE = 16  # of the latents
PAUSE_S = 0.01


def run(report: Report) -> None:
    """Write the lines of this section."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_vae(report.device, folder / "vae")
        config = folder / "models.yaml"
        config.write_text(yaml.safe_dump({"models": {"image": {"repo": str(folder / "vae"), "preload": True}}}))
        engines: list[ProcessEngine] = []

        def engine(settings: Settings, metrics: Metrics) -> ProcessEngine:
            engines.append(ProcessEngine(settings, report.device, metrics, worker=WORKER))
            return engines[0]

        started = time.perf_counter()
        with running(load_settings(config=config, device=report.device), engine) as url:
            report.line("start until ready", s=time.perf_counter() - started)
            for _ in range(3):
                answer = post(report, url, 0.5)
            report.line("before", status=answer.status_code, ms=answer.elapsed.total_seconds() * 1e3)
            if report.device == "cpu":
                killed(report, url, engines[0])
            else:
                write(report, url, "a kernel writes outside of the memory", ILLEGAL)
                write(report, url, "an index is out of range", ASSERTED)


def save_vae(device: str, folder: Path) -> None:
    """Save a VAE. It is made on the CPU, so that this process, which serves, does not use the device."""
    if device == "cpu":
        image_vae("cpu")[0].save_pretrained(folder)
        return
    from benchmarks.decode import full_size_vae

    full_size_vae(without=None).save_pretrained(folder)


def killed(report: Report, url: str, engine: ProcessEngine) -> None:
    """Kill the worker, and write when the server answers again."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    write(report, url, "the worker is killed", 0.5)


def write(report: Report, url: str, case: str, first: float) -> None:
    """Ask until the server answers, ask once more, and write how long both took and how the worker ended.

    first: the first value of the latents that are sent, by which the worker knows whether to lose the device.
    """
    began, refusals = time.perf_counter(), 0
    while (answer := post(report, url, first)).status_code != requests.codes.ok:
        refusals += 1
        report.check_time()
        time.sleep(PAUSE_S)
    until_s = time.perf_counter() - began
    following = post(report, url, 0.5)
    metrics = requests.get(url + "metrics", timeout=max(1.0, report.left_s)).text
    report.line(
        case,
        until_answer_s=until_s,
        refused_before=refusals,
        status=answer.status_code,
        next_status=following.status_code,
        next_ms=following.elapsed.total_seconds() * 1e3,
        ended=re.findall(r'^vae_worker_restarts_total\{cause="(.*?)"\} (?!0\.0)', metrics, re.M),
    )


def post(report: Report, url: str, first: float) -> requests.Response:
    """Ask for a PNG of random latents. first: their first value, by which the worker knows what to do."""
    latents: Any = np.random.default_rng(0).normal(size=(1, 4, SIDE, SIDE)).astype("float32")  # [1, C, h, w]
    latents[0, 0, 0, 0] = first
    if report.left_s <= 0:
        raise OutOfTime
    sent = {"shape": latents.shape, "dtype": "float32", "image_format": "png"}
    try:
        return requests.post(url, params=sent, data=latents.tobytes(), timeout=max(1.0, report.left_s))
    except requests.Timeout:
        raise OutOfTime from None
