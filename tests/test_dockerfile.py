"""The Dockerfile and .dockerignore, as far as can be seen without building. `make test-image` builds and runs it."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.image import main, tracked, wanted
from server.config import ServerOptions, load_settings
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text()
WITHOUT_COMMENTS = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)
LINES = re.sub(r"\\\n\s*", "", WITHOUT_COMMENTS).splitlines()
IGNORED = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
WEIGHTS = {".bin", ".ckpt", ".gguf", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"}


def of_kind(keyword: str) -> list[str]:
    """What follows it, of each instruction."""
    return [line.removeprefix(keyword).strip() for line in LINES if line.startswith(f"{keyword} ")]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for words in of_kind("ENV") for word in words.split())


def test_what_is_copied_is_what_the_context_lets_through() -> None:
    sources = {source for words in of_kind("COPY") for source in words.split()[:-1]}
    assert IGNORED[0] == "*", "nothing but what is named"
    first_bars = IGNORED.index("**/__pycache__")
    assert {line.removeprefix("!") for line in IGNORED[1:first_bars]} == sources
    assert {f"**/*{suffix}" for suffix in WEIGHTS} <= set(IGNORED[first_bars:])
    for let_through in (line.removeprefix("!") for line in IGNORED[first_bars:] if line[0] == "!"):
        assert let_through.startswith("server/demo/")


def test_the_trial_wants_what_the_server_needs_and_no_weights_but_the_demos() -> None:
    package = {name for name in tracked() if Path(name).parts[0] == "server"}
    assert package - wanted() == {"server/demo/train.py"}
    assert {name for name in wanted() if Path(name).suffix in WEIGHTS} == {
        "server/demo/diffusion_pytorch_model.safetensors",
        *(f"server/demo/latents/{name}.safetensors" for name in ("astronaut", "chelsea", "china", "coffee")),
    }


def test_the_models_of_the_image_are_its_own() -> None:
    settings = load_settings(config=REPOSITORY / "models.yaml")
    folders = [folder for name in settings.models if (folder := settings.path_of(name))]
    assert {str(folder.relative_to(REPOSITORY) / "config.json") for folder in folders} <= wanted()


def test_the_server_is_not_root_and_its_cache_is_the_volume() -> None:
    assert of_kind("USER") == ["10001:10001"]
    last_change = max(n for n, line in enumerate(LINES) if line.startswith(("RUN", "COPY")))
    assert LINES.index("USER 10001:10001") > last_change, "what is built as the user, the user may change"
    assert of_kind("VOLUME") == ["/data"]
    assert environment()["HF_HOME"] == "/data"
    accounts = [script for script in of_kind("RUN") if "useradd" in script]
    assert len(accounts) == 1
    assert "--shell /usr/sbin/nologin" in accounts[0]


def test_dependencies_come_before_code_so_that_code_changes_do_not_install_them_again() -> None:
    order = [line for line in LINES if line.startswith(("RUN", "COPY"))]
    install = next(n for n, line in enumerate(order) if "pip install" in line)
    code = next(n for n, line in enumerate(order) if line.startswith("COPY server "))
    assert install < code
    assert order[install - 1] == "COPY requirements.txt constraints.txt ./"


def test_every_setting_in_the_environment_is_an_option_of_the_server() -> None:
    prefix = "VAE_SERVER_"
    values = {
        name.removeprefix(prefix).lower(): value.replace("$DEVICE", "cpu")
        for name, value in environment().items()
        if name.startswith(prefix)
    }
    assert values.keys() <= ServerOptions.model_fields.keys()
    assert ServerOptions(**values).host == "0.0.0.0"  # inside a container
    assert "port" not in values, "it would beat the platform's own variable"
    assert of_kind("EXPOSE") == [str(ServerOptions.model_fields["port"].default)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_is_one_of_the_servers(device: str) -> None:
    assert [word.split("=")[0] for word in of_kind("ARG")] == ["DEVICE", "TORCH_INDEX_URL"]
    assert ServerOptions(device=environment()["VAE_SERVER_DEVICE"].replace("$DEVICE", device)).device == device
    assert f"{device})" in of_kind("RUN")[0]


def test_the_server_takes_its_signals_itself_and_serve_alone_is_a_command() -> None:
    """In the exec form, for a shell in between would take the signals."""
    assert [json.loads(words) for words in of_kind("ENTRYPOINT")] == [["python", "-m", "server"]]
    assert [json.loads(words) for words in of_kind("CMD")] == [["serve"]]


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server whose /health answers `status`, and anything else 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def is_healthy(port: int) -> bool:
    (check,) = of_kind("HEALTHCHECK")
    program, *arguments = json.loads(check.partition("CMD ")[2])
    assert program == "python"
    proxies = {"http_proxy": "http://127.0.0.1:9/", "HTTP_PROXY": "http://127.0.0.1:9/"}
    environment = {"VAE_SERVER_PORT": str(port), **proxies}
    ran = subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, timeout=300)
    return ran.returncode == 0


@pytest.mark.parametrize(("status", "is_well"), [(200, True), (204, False), (404, False), (503, False)])
def test_health_is_a_200_whatever_the_proxy(status: int, is_well: bool) -> None:
    with answering(status) as port:
        assert is_healthy(port) is is_well


def test_no_server_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    assert not is_healthy(port)


def test_what_the_readme_names_is_there() -> None:
    text = (REPOSITORY / "deploy/README.md").read_text()
    declared = {word.split("=")[0] for word in of_kind("ARG")}
    assert set(re.findall(r"--build-arg (?:\n)?([A-Z_]{5,})=", text)) == declared
    settings = {name.lower() for name in re.findall(r"VAE_SERVER_(\w+)", text)}
    assert settings <= ServerOptions.model_fields.keys()
    assert all(flag in text for option in main.params for flag in option.opts if flag.startswith("--"))
