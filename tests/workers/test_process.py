"""What is decided before a worker process starts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from server import cores
from server.config import load_settings
from server.metrics import Metrics
from server.scheduling.dispatcher import Dispatcher
from server.workers import devices as devices_module
from tests.conftest import write_models_yaml
from tests.vaes import LocalVae


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "CGROUP_LIMIT", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("limit", "devices", "threads"),
    [
        (None, ["cpu"], None),
        (None, ["cpu", "cpu"], 4),
        (None, ["cuda:0", "cuda:1"], None),
        ("max 100000", ["auto"], None),
        ("200000 100000", ["auto"], 2),
        ("50000 100000", ["cpu"], 1),
        ("400000 100000", ["cpu", "cpu"], 2),
        ("1600000 100000", ["cpu"], None),
    ],
)
def test_workers_share_the_cores_that_the_container_has(
    eight_cores: Path, limit: str | None, devices: list[str], threads: int | None
) -> None:
    if limit:
        eight_cores.write_text(limit)
    assert devices_module.threads_for(devices) == threads


def test_each_device_gets_a_worker_and_a_model_its_own_device(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    models: dict[str, Any] = {name: {"repo": str(vaes["sd"].folder)} for name in ("any", "pinned")}
    models["pinned"]["device"] = "cpu"
    config = write_models_yaml(tmp_path / "models.yaml", models, "any")

    async def started(device: str) -> list[tuple[str, list[str]]]:
        settings = load_settings(config=config, device=device)
        dispatcher = Dispatcher(devices_module.engines_for(settings, Metrics()), settings.options)
        await dispatcher.start()
        runs = [(engine.device, [name for name in models if engine.can_run(name)]) for engine in dispatcher.engines]
        await dispatcher.close()
        return runs

    assert asyncio.run(started("auto")) == [("cpu", ["any", "pinned"])]
    assert asyncio.run(started("cpu,cpu")) == [("cpu", ["any", "pinned"])] * 2


def test_cuda_devices_and_pinned_models_get_engines_of_their_own(tmp_path: Path) -> None:
    models: dict[str, Any] = {name: {"repo": "owner/name"} for name in ("any", "second", "cpu")}
    models["second"]["device"] = "cuda:1"
    models["cpu"]["device"] = "cpu"
    settings = load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "any"), device="cuda")
    (first,) = devices_module.engines_for(settings, Metrics())
    first._be_ready = lambda device, devices: None

    async def grown() -> list[tuple[str, list[str]]]:
        first._first = asyncio.get_running_loop().create_future()
        first._supervise = asyncio.Event().wait
        starting = asyncio.create_task(first.start(lambda: None))
        await asyncio.sleep(0)
        first.device, first._devices = "cuda:0", 2
        first._first.set_result(None)
        engines = [first, *await starting]
        assert first._supervising
        first._supervising.cancel()
        return [(engine.device, [name for name in models if engine.can_run(name)]) for engine in engines]

    assert asyncio.run(grown()) == [("cuda:0", ["any"]), ("cuda:1", ["any", "second"]), ("cpu", ["cpu"])]


@pytest.mark.parametrize(("quota", "workers", "expected"), [("max", 1, 4), ("max", 4, 2), ("200000", 1, 2)])
def test_workers_share_the_cores_for_rendering(eight_cores: Path, quota: str, workers: int, expected: int) -> None:
    eight_cores.write_text(f"{quota} 100000")
    assert cores.usual_render_threads(workers) == expected
