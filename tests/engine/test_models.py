"""The models of one device while several threads want it: nothing waits for itself, and nothing in use is unloaded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import load_settings
from server.engine.models import LoadedModels, NotLoaded
from server.engine.pipeline import NonFiniteOutput
from server.engine.weights import loading
from server.errors import ModelUnavailable, TooLargeForDevice
from server.model_info import CoderId, Direction
from server.values import Geometry, Request, Result
from tests.conftest import write_models_yaml
from tests.requests import decode_job
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def engine(vaes: dict[str, LocalVae], tmp_path: Path) -> LoadedModels:
    models: dict[str, Any] = {name: {"repo": str(vaes[name].folder), "dtype": "float32"} for name in ("sd", "flux")}
    return LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "sd"), max_loaded=2))


def request(side: int = 16, model: str = "sd", channels: int = 4) -> Request:
    shape = (1, channels, side, side)
    data = memoryview(torch.randn(shape, generator=torch.Generator().manual_seed(side)).numpy().tobytes())
    geometry = Geometry(shape, is_packed=False, num_frames=1, height=8 * side, width=8 * side)
    return Request(decode_job(model, geometry), data)


def started(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_work_between_steps_does_not_wait_for_a_load_that_waits_for_the_device(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load("sd")
    expected = engine.run([request(8)])[0]
    reading, go, between = threading.Event(), threading.Event(), []
    load_vae = loading.load_vae

    def slow(*arguments: Any) -> Any:
        reading.set()
        assert go.wait(PATIENCE_S)
        return load_vae(*arguments)

    monkeypatch.setattr(loading, "load_vae", slow)

    def check() -> None:
        if not between:
            loads.append(started(lambda: engine.load("sd", Direction.ENCODE)))
            assert reading.wait(PATIENCE_S)
            between.append(engine.run([request(8)])[0])
            go.set()

    loads: list[threading.Thread] = []
    done: list[Any] = []
    running = started(lambda: done.append(engine.run([request()], check=check)[0]))
    running.join(PATIENCE_S)
    assert not running.is_alive(), "the device and the load wait for each other"
    loads[0].join(PATIENCE_S)
    assert isinstance(done[0], Result)
    assert bytes(between[0].body.data) == bytes(expected.body.data)
    assert engine.holds(CoderId("sd", Direction.ENCODE))


def test_work_between_steps_loads_nothing(engine: LoadedModels) -> None:
    raised: list[BaseException] = []

    def check() -> None:
        if not raised:
            with pytest.raises(NotLoaded) as told:
                engine.run([request(8, "flux", 16)])
            raised.append(told.value)

    assert isinstance(engine.run([request()], check=check)[0], Result)
    assert raised


def test_a_load_runs_between_the_steps_of_long_work(engine: LoadedModels) -> None:
    engine.load("sd")
    loads: list[threading.Thread] = []

    def check() -> None:
        if not loads:
            loads.append(started(lambda: engine.load("flux")))
        elif not engine.holds(CoderId("flux", Direction.DECODE)):
            steps.append(1)

    steps: list[int] = []
    until_loaded = request(64)
    while not engine.holds(CoderId("flux", Direction.DECODE)):
        assert isinstance(engine.run([until_loaded], check=check)[0], Result)
    loads[0].join(PATIENCE_S)


def test_a_model_in_use_is_unloaded_after_its_use(engine: LoadedModels) -> None:
    """Its memory is not free before, and the model that takes its place would find none."""
    engine.load("sd")
    engine.load("flux")
    order: list[str] = []
    loads: list[threading.Thread] = []

    def load() -> None:
        engine.load("sd", Direction.ENCODE)  # the third one: the least recently used leaves
        order.append("loaded")

    def check() -> None:
        engine._note_use(next(key for key in engine._loaded if key.name == "flux"))  # so that sd is the one to leave
        if not loads:
            loads.append(started(load))
        threading.Event().wait(0.005)

    assert isinstance(engine.run([request(32)], check=check)[0], Result)
    order.append("computed")
    loads[0].join(PATIENCE_S)
    until(lambda: not engine.holds(CoderId("sd", Direction.DECODE)))
    assert order == ["computed", "loaded"]


def test_the_time_that_others_had_is_not_the_works_own(engine: LoadedModels) -> None:
    engine.load("sd")

    def check() -> None:
        threading.Event().wait(0.02)
        steps.append(1)

    steps: list[int] = []
    outcome = engine.run([request()], check=check)[0]
    assert isinstance(outcome, Result)
    assert outcome.device_ms > 0
    assert len(steps) > 10
    alone = engine.run([request()])[0]
    assert isinstance(alone, Result)
    assert outcome.device_ms < alone.device_ms + 1e3 * 0.02 * len(steps)


NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: can't allocate memory")


def fill_memory(engine: LoadedModels, monkeypatch: pytest.MonkeyPatch, beside: CoderId | None) -> None:
    """Let every decode of `sd` run out of memory while another coder is loaded; `beside` None: always."""
    coder: Any = engine.load("sd").coder
    decode = coder.decode

    def full(*arguments: Any, **named: Any) -> Any:
        if beside is None or engine.holds(beside):
            raise NO_MEMORY
        return decode(*arguments, **named)

    monkeypatch.setattr(coder, "decode", full)


FLUX = CoderId("flux", Direction.DECODE)


def test_another_model_is_unloaded_before_a_request_is_too_large(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.run([request()])[0]
    engine.load("flux")
    fill_memory(engine, monkeypatch, FLUX)
    found = engine.run([request()])[0]
    assert isinstance(found, Result)
    assert isinstance(expected, Result)
    assert bytes(found.body.data) == bytes(expected.body.data)
    assert not engine.holds(FLUX)


def test_a_request_that_fits_nowhere_is_too_large_once_the_others_are_unloaded(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load("flux")
    fill_memory(engine, monkeypatch, None)
    assert isinstance(engine.run([request()])[0], TooLargeForDevice)
    assert not engine.holds(FLUX)
    assert engine.holds(CoderId("sd", Direction.DECODE))


def test_work_between_steps_unloads_nothing(engine: LoadedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    between: list[Any] = []
    fill_memory(engine, monkeypatch, FLUX)

    def check() -> None:
        if not between:
            between.append(engine.run([request(8)])[0])

    assert isinstance(engine.run([request(16, "flux", 16)], check=check)[0], Result)
    assert isinstance(between[0], TooLargeForDevice)
    assert engine.holds(FLUX)


def test_a_load_without_memory_unloads_other_models_and_tries_again(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = loading.load_vae

    def load_vae(info: Any, *arguments: Any) -> Any:
        if info.name == "flux" and engine.holds(CoderId("sd")):
            raise torch.OutOfMemoryError("out of memory")
        return read(info, *arguments)

    monkeypatch.setattr(loading, "load_vae", load_vae)
    engine.load("sd")
    assert engine.load("flux").info.decoder
    assert not engine.holds(CoderId("sd"))


def test_a_load_without_memory_and_without_other_models_says_so(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_vae(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loading, "load_vae", load_vae)
    with pytest.raises(ModelUnavailable) as caught:
        engine.load("sd")
    assert "its weights do not fit the memory of cpu" in caught.value.detail


def test_a_float32_copy_without_memory_is_too_large_and_no_fault_of_the_latents(
    engine: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = engine._settings.models["sd"].model_copy(update={"dtype": "bfloat16"})
    half = LoadedModels(engine._settings.model_copy(update={"models": {"sd": entry}}))
    read = loading.load_vae

    def load_vae(info: Any, source: Any, dtype: torch.dtype, *rest: Any) -> Any:
        if dtype is torch.float32:
            raise torch.OutOfMemoryError("out of memory")
        return read(info, source, dtype, *rest)

    monkeypatch.setattr(loading, "load_vae", load_vae)
    monkeypatch.setattr("server.engine.models.run", lambda *_: [NonFiniteOutput()])
    (outcome,) = half.run([request()])
    assert isinstance(outcome, TooLargeForDevice)
    assert str(outcome) == (
        "these latents overflow the VAE in half precision, and its copy in float32 does not fit this server's memory; "
        "check scaling_factor and dtype"
    )
