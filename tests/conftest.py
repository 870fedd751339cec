"""Fixtures: small VAEs, and a server that serves them, which is a real uvicorn on a free port."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
import yaml

from server.commands.serving import bind
from server.config import Settings, load_settings
from server.engine.local import LocalEngine
from server.engine.runner import Runner
from server.engine.video_render import VideoRender
from server.metrics import Metrics
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.service import Service
from server.web.app import create_app
from server.web.protocol import uvicorn_config
from tests.vaes import LocalVae, build_all, write_entries
from tests.waiting import PATIENCE_S, until

REPOSITORY = Path(__file__).resolve().parent.parent


# The test files that take longest or start most processes. They begin first, so that no slow file remains at the end.
LONGEST = ("test_ray_serve", "test_load", "test_workers", "test_toolkit", "test_video_decoders", "test_serving_process")


def pytest_configure() -> None:
    take_default_signals()
    if "PYTEST_XDIST_WORKER" in os.environ:
        share_the_cores()


def take_default_signals() -> None:
    """Make child processes start with default signals.

    `make test &` in a shell ignores SIGINT, and nohup ignores SIGHUP. Child processes inherit ignored signals but not
    handlers, so the tests replace an ignored signal by a handler that does nothing.
    """
    for ending in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(ending) is signal.SIG_IGN:
            signal.signal(ending, lambda *_: None)


def share_the_cores() -> None:
    """Compute on one thread, for runs with several test processes.

    Small VAEs gain nothing from a second thread, and OpenMP's threads would wait for each other most of the time.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalVae]:
    return build_all(tmp_path_factory.mktemp("vaes"))


def write_models_yaml(path: Path, models: dict[str, Any], default: str) -> Path:
    path.write_text(yaml.safe_dump({"default": default, "models": models}))
    return path


@pytest.fixture(scope="session")
def models_yaml(vaes: dict[str, LocalVae]) -> Path:
    return write_entries(vaes["sd"].folder.parent)


@contextmanager
def running(settings: Settings, engine: Any = None, until_started: bool = True) -> Iterator[str]:
    """Run a server in a thread of this process, and yield its URL.

    engine: makes the engine from the settings and the metrics; by default, a LocalEngine.
    until_started: wait until the server is READY or FAILED.
    """
    started = threading.Event()
    listener = bind("127.0.0.1", 0)
    metrics = Metrics()
    dispatcher = Dispatcher([engine(settings, metrics) if engine else LocalEngine(settings)], settings.options)
    service = Service(settings, dispatcher, metrics)
    server = uvicorn.Server(uvicorn_config(create_app(service, started.set)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        if until_started:
            until(lambda: started.is_set() or not thread.is_alive(), "the start of the server")
            assert started.is_set(), "the server did not start"
        yield f"{'https' if settings.options.tls_cert else 'http'}://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()


@pytest.fixture(scope="session")
def url(models_yaml: Path) -> Iterator[str]:
    with running(load_settings(config=models_yaml)) as address:
        yield address


Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server with a test's own models and flags. The first model is the default."""
    with ExitStack() as stack:

        def start(models: dict[str, Any], engine: Any = None, until_started: bool = True, **flags: Any) -> str:
            config = write_models_yaml(tmp_path / "models.yaml", models, next(iter(models)))
            settings = load_settings(config=config, **flags)
            return stack.enter_context(running(settings, engine, until_started))

        yield start


@pytest.fixture
def held_video(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The decode of a video waits, once nine of its frames are done, until this is set."""
    event, write, done = threading.Event(), VideoRender.write, 0

    def holds(self: Any, frames: Any) -> None:
        nonlocal done
        done += len(frames)
        write(self, frames)
        if done >= 9:
            assert event.wait(PATIENCE_S)

    monkeypatch.setattr(VideoRender, "write", holds)
    yield event
    event.set()


@pytest.fixture
def held_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is computed until this is set."""
    event, compute = threading.Event(), Runner._compute

    def waits(self: Any, *arguments: Any) -> Any:
        assert event.wait(PATIENCE_S)
        return compute(self, *arguments)

    monkeypatch.setattr(Runner, "_compute", waits)
    yield event
    event.set()


@pytest.fixture
def one_core() -> Iterator[None]:
    """Compute on one thread.

    The smallest VAE gains nothing from a second one, and on a busy machine OpenMP's threads wait for each other for
    seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
