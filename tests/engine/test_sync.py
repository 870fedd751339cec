"""The models of one device while several threads want it: nothing waits for itself, and nothing in use is unloaded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import load_settings
from server.engine import loader
from server.engine.sync import NotLoaded, SyncEngine
from server.types import Computed, Geometry, Layout, Operation, RawTensor, Scaling, VAEJob
from tests.conftest import write_models_yaml
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def engine(vaes: dict[str, LocalVae], tmp_path: Path) -> SyncEngine:
    models: dict[str, Any] = {name: {"repo": str(vaes[name].folder), "dtype": "float32"} for name in ("sd", "flux")}
    return SyncEngine(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "sd"), max_loaded=2))


def job(side: int = 16, model: str = "sd", channels: int = 4) -> VAEJob:
    shape = (1, channels, side, side)
    data = memoryview(torch.randn(shape, generator=torch.Generator().manual_seed(side)).numpy().tobytes())
    geometry = Geometry(shape, is_packed=False, num_frames=1, height=8 * side, width=8 * side)
    return VAEJob(model, RawTensor(shape, "float32", data), geometry, Scaling(), Layout.PIXELS)


def started(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_work_between_steps_does_not_wait_for_a_load_that_waits_for_the_device(
    engine: SyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load("sd")
    expected = engine.run([job(8)])[0]
    reading, go, between = threading.Event(), threading.Event(), []
    load_vae = loader.load_vae

    def slow(*arguments: Any) -> Any:
        reading.set()
        assert go.wait(PATIENCE_S)
        return load_vae(*arguments)

    monkeypatch.setattr(loader, "load_vae", slow)

    def check() -> None:
        if not between:
            loading.append(started(lambda: engine.load("sd", Operation.ENCODE)))
            assert reading.wait(PATIENCE_S)
            between.append(engine.run([job(8)])[0])
            go.set()

    loading: list[threading.Thread] = []
    done: list[Any] = []
    running = started(lambda: done.append(engine.run([job()], check=check)[0]))
    running.join(PATIENCE_S)
    assert not running.is_alive(), "the device and the load wait for each other"
    loading[0].join(PATIENCE_S)
    assert isinstance(done[0], Computed)
    assert bytes(between[0].tensor.data) == bytes(expected.tensor.data)
    assert engine.holds("sd", Operation.ENCODE)


def test_work_between_steps_loads_nothing(engine: SyncEngine) -> None:
    raised: list[BaseException] = []

    def check() -> None:
        if not raised:
            with pytest.raises(NotLoaded) as told:
                engine.run([job(8, "flux", 16)])
            raised.append(told.value)

    assert isinstance(engine.run([job()], check=check)[0], Computed)
    assert raised


def test_a_load_runs_between_the_steps_of_long_work(engine: SyncEngine) -> None:
    engine.load("sd")
    loading: list[threading.Thread] = []

    def check() -> None:
        if not loading:
            loading.append(started(lambda: engine.load("flux")))
        elif not engine.holds("flux", Operation.DECODE):
            steps.append(1)

    steps: list[int] = []
    until_loaded = job(64)
    while not engine.holds("flux", Operation.DECODE):
        assert isinstance(engine.run([until_loaded], check=check)[0], Computed)
    loading[0].join(PATIENCE_S)


def test_a_model_in_use_is_unloaded_after_its_use(engine: SyncEngine) -> None:
    """Its memory is not free before, and the model that takes its place would find none."""
    engine.load("sd")
    engine.load("flux")
    order: list[str] = []
    loading: list[threading.Thread] = []

    def load() -> None:
        engine.load("sd", Operation.ENCODE)  # the third one: the least recently used leaves
        order.append("loaded")

    def check() -> None:
        engine._note_use(next(key for key in engine._loaded if key.name == "flux"))  # so that sd is the one to leave
        if not loading:
            loading.append(started(load))
        threading.Event().wait(0.005)

    assert isinstance(engine.run([job(32)], check=check)[0], Computed)
    order.append("decoded")
    loading[0].join(PATIENCE_S)
    until(lambda: not engine.holds("sd", Operation.DECODE))
    assert order == ["decoded", "loaded"]


def test_the_time_that_others_had_is_not_the_works_own(engine: SyncEngine) -> None:
    engine.load("sd")

    def check() -> None:
        threading.Event().wait(0.02)
        steps.append(1)

    steps: list[int] = []
    outcome = engine.run([job()], check=check)[0]
    assert isinstance(outcome, Computed)
    assert outcome.device_ms > 0
    assert len(steps) > 10
    alone = engine.run([job()])[0]
    assert isinstance(alone, Computed)
    assert outcome.device_ms < alone.device_ms + 1e3 * 0.02 * len(steps)
