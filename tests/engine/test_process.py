"""What is decided before a worker process starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from server.config import load_settings
from server.engine import process
from server.metrics import Metrics
from tests.conftest import write_models_yaml


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(process, "CGROUP_LIMIT", tmp_path / "cpu.max")
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
    assert process.threads_for(devices) == threads


def test_each_device_gets_a_worker_and_a_model_its_own_device(tmp_path: Path) -> None:
    models: dict[str, Any] = {name: {"repo": "owner/name"} for name in ("a", "b", "c")}
    models["b"]["device"] = "cuda:1"
    models["c"]["device"] = "cpu"
    config = write_models_yaml(tmp_path / "models.yaml", models, "a")
    engines = process.engines_for(load_settings(config=config, device="cuda:0,cuda:1"), Metrics())
    assert [engine.device for engine in engines] == ["cuda:0", "cuda:1", "cpu"]
    runs = {engine.device: [name for name in models if engine.can_run(name)] for engine in engines}
    assert runs == {"cuda:0": ["a"], "cuda:1": ["a", "b"], "cpu": ["c"]}
