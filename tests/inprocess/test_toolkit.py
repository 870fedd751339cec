"""handler.py inside the app of Hugging Face's inference toolkit, as uvicorn runs that in the default container.

TOOLKIT=FOLDER is the toolkit's own source; no package index has it. `make test-endpoints` brings the image's packages.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import starlette
from starlette.applications import Starlette

from server.config import load_settings
from server.engine.local import LocalEngine
from server.inprocess.toolkit import take_over
from tests.conftest import REPOSITORY
from tests.contract.__main__ import CASES, Case
from tests.vaes import LocalVae, build_all, write_entries
from tests.waiting import PATIENCE_S, until

TOOLKIT = os.environ.get("TOOLKIT")
STAND_IN = REPOSITORY / "tests" / "endpoints"
HAS_STARTUP_HOOKS = int(starlette.__version__.split(".")[0]) < 1  # what the toolkit's app is made with

Vaes = dict[str, LocalVae]


@dataclass(frozen=True)
class App:
    """The app in a process of its own. log: both of its streams."""

    address: tuple[str, int]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return "http://{}:{}/".format(*self.address)

    def wait_until(self, status: int) -> list[int]:
        """Every status of /health until it is this one."""
        seen: list[int] = []

        def is_told() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(requests.ConnectionError):
                seen.append(requests.get(self.url + "health", timeout=300).status_code)
            return status in seen

        until(is_told, f"{status} of /health")
        return seen


@contextmanager
def launched(app_dir: Path, folder: Path, log: Path, **environment: str) -> Iterator[App]:
    """As the container's entry point does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "webservice_starlette:app",
        "--app-dir",
        app_dir,
        "--port",
        str(address[1]),
    ]
    # One thread: small VAEs gain nothing by more, and OpenMP's threads wait for each other on a busy machine.
    variables = {
        **os.environ,
        "HF_MODEL_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=log.parent, env=variables, stdout=stream, stderr=stream)
    try:
        yield App(address, process, log)
    finally:
        process.kill()
        process.wait()


def push(folder: Path) -> Path:
    """What deploy/endpoints.md tells to push, beside the VAEs and their models.yaml."""
    for name in ("handler.py", "server", "requirements.txt"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module", params=["stand_in", "toolkit"])
def app_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of webservice_starlette.py, laid out as in the container."""
    if request.param == "stand_in":
        return STAND_IN
    if not TOOLKIT:
        pytest.skip("set TOOLKIT to the folder of huggingface-inference-toolkit's source")
    if not HAS_STARTUP_HOOKS:
        pytest.skip("the toolkit does not start with Starlette 1.0 and newer")
    return laid_out(Path(TOOLKIT), tmp_path_factory.mktemp("app"))


def laid_out(toolkit: Path, app: Path) -> Path:
    package = toolkit.resolve() / "src" / "huggingface_inference_toolkit"
    (app / package.name).symlink_to(package)
    (app / "webservice_starlette.py").symlink_to(package / "webservice_starlette.py")
    return app


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vaes]:
    folder = push(tmp_path_factory.mktemp("repository"))
    vaes = build_all(folder)
    write_entries(folder)
    return folder, vaes


@pytest.fixture(scope="module")
def app(app_dir: Path, pushed: tuple[Path, Vaes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with launched(app_dir, pushed[0], tmp_path_factory.mktemp("log") / "log") as app:
        app.wait_until(200)
        yield app


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contract_holds_inside(app: App, pushed: tuple[Path, Vaes], case: Case) -> None:
    case.run(app.url, pushed[1])


def test_what_is_not_served_is_told_as_in_our_own_app(app: App) -> None:
    for path, status in (("a/b/c", 404), ("encode", 405)):
        refused = requests.get(app.url + path, timeout=300)
        assert refused.status_code == status
        assert refused.json()["request_id"] == refused.headers["X-Request-Id"]
    assert requests.post(app.url + "lost", timeout=300).json()["code"] == "unknown_model"
    assert len(requests.get(app.url + "models", timeout=300).json()["models"]) == 7
    assert "\ninf_queue_size 0.0\n" in requests.get(app.url + "metrics", timeout=300).text
    assert requests.get(app.url + "predict/", timeout=300).status_code == 405, "a slash at the end is fine"


def test_it_answers_for_the_name_that_the_proxy_gives(app: App) -> None:
    headers = {"Host": "abc.region.vendor.endpoints.example"}
    assert requests.get(app.url, headers=headers, timeout=300).text == "Ok"


def test_requests_that_come_together_are_decoded_together(app: App, pushed: tuple[Path, Vaes]) -> None:
    """The toolkit's own code would take one after another."""
    case = next(case for case in CASES if case.name == "a_jpeg_is_the_default_and_shows_the_same_picture")
    with ThreadPoolExecutor(12) as pool:
        for _ in range(5):
            list(pool.map(lambda _: case.run(app.url, pushed[1]), range(12)))
    lines = requests.get(app.url + "metrics", timeout=300).text.splitlines()
    counts = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("vae_batch_size_")}
    assert counts["vae_batch_size_sum"] > counts["vae_batch_size_count"]


def half_sent(app: App, vaes: Vaes) -> tuple[socket.socket, bytes]:
    """A request that the server has admitted and reads, and the rest of its body."""
    body = vaes["sd"].latents(8, 8).numpy().tobytes()
    connection = socket.create_connection(app.address)
    query = "shape=1,4,8,8&dtype=float32&image_format=png"
    connection.sendall(f"POST /?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:9])
    while "\nvae_queue_bytes 0.0\n" in requests.get(app.url + "metrics", timeout=300).text:
        time.sleep(0.02)
    return connection, body[9:]


def wait_until_nobody_listens(app: App) -> None:
    with suppress(ConnectionRefusedError):
        while True:
            socket.create_connection(app.address).close()
            time.sleep(0.02)


def test_what_was_accepted_is_answered_before_the_end(app_dir: Path, pushed: tuple[Path, Vaes], tmp_path: Path) -> None:
    with launched(app_dir, pushed[0], tmp_path / "log") as app:
        app.wait_until(200)
        connection, rest = half_sent(app, pushed[1])
        with connection:
            app.process.send_signal(signal.SIGTERM)
            wait_until_nobody_listens(app)
            connection.sendall(rest)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\x89PNG" in answer
        assert app.process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
        assert "Traceback" not in app.log.read_text()


def test_health_is_503_until_the_default_model_is_there(app_dir: Path, vaes: Vaes, tmp_path: Path) -> None:
    folder = push(tmp_path)
    warmup = [[512, 512 + 64 * n] for n in range(8)]
    models = f"models: {{slow: {{repo: '{vaes['sd'].folder}', dtype: float32, warmup: {warmup}}}}}"
    (folder / "models.yaml").write_text(models)
    with launched(app_dir, folder, tmp_path / "log") as app:
        assert app.wait_until(503) == [503]
        assert requests.get(app.url + "health/live", timeout=300).status_code == 200
        assert set(app.wait_until(200)) == {503, 200}
        assert requests.get(app.url + "models", timeout=300).json()["models"][0]["state"] == "loaded"


def test_a_default_model_that_does_not_load_ends_the_process(app_dir: Path, tmp_path: Path) -> None:
    folder = push(tmp_path)
    (folder / "models.yaml").write_text("models: {lost: {repo: ./lost}}")
    with launched(app_dir, folder, tmp_path / "log") as app:
        app.process.wait(PATIENCE_S)
        assert "lost (./lost): there is no such file or folder" in app.log.read_text()


def test_a_configuration_that_cannot_be_read_ends_the_process(app_dir: Path, tmp_path: Path) -> None:
    folder = push(tmp_path)
    (folder / "models.yaml").write_text("models: {m: {repo: ./m, preloud: true}}")
    with launched(app_dir, folder, tmp_path / "log") as app:
        app.process.wait(PATIENCE_S)
        assert "unknown key, did you mean 'preload'" in app.log.read_text()


VERTEX = {"AIP_MODE": "PREDICTION", "AIP_PREDICT_ROUTE": "/their/predict", "AIP_HEALTH_ROUTE": "/their/health"}


def post_theirs(app: App, vaes: Vaes) -> requests.Response:
    inputs = base64.b64encode(vaes["sd"].latents(8, 8).numpy().tobytes()).decode()
    body = {"inputs": inputs, "parameters": {"shape": [1, 4, 8, 8], "dtype": "float32"}}
    headers = {"Accept": "image/png"}
    return requests.post(app.url + "their/predict", json=body, headers=headers, timeout=300)


def test_the_routes_that_vertex_names_are_the_servers(app_dir: Path, vaes: Vaes, tmp_path: Path) -> None:
    folder = push(tmp_path)
    (folder / "models.yaml").write_text(f"models: {{sd: {{repo: '{vaes['sd'].folder}', dtype: float32}}}}")
    with launched(app_dir, folder, tmp_path / "log", **VERTEX) as app:
        app.wait_until(200)
        loaded = requests.get(app.url + "models", timeout=300).json()["models"][0]
        assert loaded["state"] == "loaded", "ready means that the default model is loaded"
        answer = post_theirs(app, vaes)
        assert answer.status_code == 200, answer.text
        assert "X-Request-Id" in answer.headers, "it is not the toolkit's answer"
        assert answer.content.startswith(b"\x89PNG")
        assert requests.get(app.url + "their/health", timeout=300).json() == {"status": "ready"}


def test_keys_close_every_route_but_health(app_dir: Path, pushed: tuple[Path, Vaes], tmp_path: Path) -> None:
    with launched(app_dir, pushed[0], tmp_path / "log", **VERTEX, VAE_SERVER_API_KEY="secret") as app:
        app.wait_until(200)
        proxied = {"Authorization": "Bearer the-proxy-s"}
        for path in ("", "models", "metrics"):
            assert requests.get(app.url + path, headers=proxied, timeout=300).status_code == 401
            assert requests.get(app.url + path, headers=proxied | {"X-API-Key": "secret"}, timeout=300).ok
        assert post_theirs(app, pushed[1]).status_code == 401


def test_the_end_of_the_event_loop_closes_the_engine(models_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    async def close(engine: LocalEngine) -> None:
        closed.append(engine)
        await really_close(engine)

    app = Starlette()  # it keeps the server's task alive, as the toolkit's own app does

    async def start_up() -> None:
        take_over(app, load_settings(config=models_yaml))
        await asyncio.sleep(0)

    really_close = LocalEngine.close
    monkeypatch.setattr(LocalEngine, "close", close)
    asyncio.run(start_up())
    assert len(closed) == 1


@pytest.mark.skipif(not TOOLKIT or HAS_STARTUP_HOOKS, reason="needs TOOLKIT and Starlette 1.0 or newer")
def test_the_toolkit_itself_does_not_start_with_a_newer_starlette(pushed: tuple[Path, Vaes], tmp_path: Path) -> None:
    assert TOOLKIT
    (tmp_path / "app").mkdir()
    with launched(laid_out(Path(TOOLKIT), tmp_path / "app"), pushed[0], tmp_path / "log") as app:
        assert app.process.wait(PATIENCE_S) != 0
        assert "on_startup" in app.log.read_text()
