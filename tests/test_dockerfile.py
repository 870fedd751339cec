"""The Dockerfile and .dockerignore, as deploy/dockerfile.py reads them: what they promise can be seen without building."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pytest

from deploy.chroot_build import copy, main
from deploy.dockerfile import (
    Arg,
    Cmd,
    Copy,
    DockerfileError,
    Env,
    Expose,
    Healthcheck,
    Ignored,
    Run,
    User,
    Volume,
    expand,
    parse,
)
from server.config import ServerOptions, load_settings
from tests.conftest import REPOSITORY

Kind = TypeVar("Kind")

TEXT = (REPOSITORY / "Dockerfile").read_text()
INSTRUCTIONS = parse(TEXT)
IGNORED = Ignored((REPOSITORY / ".dockerignore").read_text())
WEIGHTS = {".bin", ".ckpt", ".gguf", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"}
DEMO_WEIGHTS = {
    "server/demo/diffusion_pytorch_model.safetensors",
    *(f"server/demo/latents/{name}.safetensors" for name in ("astronaut", "chelsea", "china", "coffee")),
}


def of_kind(kind: type[Kind]) -> list[Kind]:
    return [instruction for instruction in INSTRUCTIONS if isinstance(instruction, kind)]


def environment() -> dict[str, str]:
    return {name: value for env in of_kind(Env) for name, value in env.values.items()}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What COPY brings into the image, relative to its working directory."""
    root = tmp_path_factory.mktemp("image")
    for instruction in of_kind(Copy):
        for source in instruction.sources:
            copy(REPOSITORY / source, root / instruction.target, is_into=instruction.target.endswith("/"))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_the_image_holds_what_the_server_needs(copied: set[str]) -> None:
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "server").rglob("*")
        if path.suffix in {".py", ".yaml", ".html", ".json", ".css", ".js"} and "__pycache__" not in path.parts
    }
    needed = {"LICENSE", "handler.py", "models.yaml", "requirements.txt", "constraints.txt", *package, *DEMO_WEIGHTS}
    assert needed - {"server/demo/train.py"} <= copied
    assert {"server/http/openapi.yaml", "server/http/page.html", "server/demo/config.json"} <= copied


def test_the_image_holds_nothing_else(copied: set[str]) -> None:
    files = {"LICENSE", "handler.py", "models.yaml", "requirements.txt", "constraints.txt"}
    assert {path for path in copied if not path.startswith("server/")} == files
    assert {path for path in copied if Path(path).suffix in WEIGHTS} == DEMO_WEIGHTS
    assert not [path for path in copied if "__pycache__" in path or path.endswith(".pyc")]


@pytest.mark.parametrize(
    "path",
    [
        "tests/test_dockerfile.py",
        "benchmarks/codecs.py",
        "docs/architecture.md",
        "deploy/chroot_build.py",
        ".git/config",
        ".venv/lib/python3.11/site-packages/torch/__init__.py",
        "models/flux/diffusion_pytorch_model.safetensors",
        "keys.txt",
        "server/.env",
        "server/__pycache__/cli.cpython-311.pyc",
        "server/demo/train.py",
        "server/demo/other.safetensors",
        "server/models/vae.pt",
        *(f"server/vae{suffix}" for suffix in sorted(WEIGHTS)),
    ],
)
def test_dockerignore_keeps_it_out(path: str) -> None:
    assert IGNORED.covers(PurePosixPath(path))


def test_the_models_of_the_image_are_its_own(copied: set[str]) -> None:
    settings = load_settings(config=REPOSITORY / "models.yaml")
    for name in settings.models:
        folder = settings.folder_of(name)
        assert folder is None or str(folder.relative_to(REPOSITORY) / "config.json") in copied


def test_the_server_is_not_root_and_its_cache_is_the_volume() -> None:
    assert of_kind(User) == [User(10001, 10001)]
    last_change = max(n for n, instruction in enumerate(INSTRUCTIONS) if isinstance(instruction, Run | Copy))
    assert INSTRUCTIONS.index(User(10001, 10001)) > last_change, "what is built as the user, the user may change"
    assert of_kind(Volume) == [Volume("/data")]
    assert environment()["HF_HOME"] == "/data"
    accounts = [run.script for run in of_kind(Run) if "useradd" in run.script]
    assert len(accounts) == 1
    assert "--shell /usr/sbin/nologin" in accounts[0]


def test_dependencies_come_before_code_so_that_code_changes_do_not_install_them_again() -> None:
    order = [instruction for instruction in INSTRUCTIONS if isinstance(instruction, Run | Copy)]
    install = next(n for n, each in enumerate(order) if isinstance(each, Run) and "pip install" in each.script)
    code = next(n for n, each in enumerate(order) if isinstance(each, Copy) and "server" in each.sources)
    assert install < code
    assert order[install - 1] == Copy(("requirements.txt", "constraints.txt"), "./")


def test_every_setting_in_the_environment_is_an_option_of_the_server() -> None:
    prefix = "VAE_SERVER_"
    values = {
        name.removeprefix(prefix).lower(): expand(value, {"DEVICE": "cpu"})
        for name, value in environment().items()
        if name.startswith(prefix)
    }
    assert values.keys() <= ServerOptions.model_fields.keys()
    options = ServerOptions(**values)
    assert options.host == "0.0.0.0"  # inside a container
    assert of_kind(Expose) == [Expose(options.port)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_is_one_of_the_servers(device: str) -> None:
    assert [arg.name for arg in of_kind(Arg)] == ["DEVICE", "TORCH_INDEX_URL"]
    assert ServerOptions(device=expand(environment()["VAE_SERVER_DEVICE"], {"DEVICE": device})).device == device
    assert f"{device})" in of_kind(Run)[0].script


def test_the_server_takes_its_signals_itself() -> None:
    assert of_kind(Cmd) == [Cmd(("python", "-m", "server", "serve"))]
    with pytest.raises(DockerfileError, match="exec form"):
        parse("FROM scratch\nCMD python -m server serve")


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
    (check,) = of_kind(Healthcheck)
    assert check.argv[0] == "python"
    proxies = {"http_proxy": "http://127.0.0.1:9/", "HTTP_PROXY": "http://127.0.0.1:9/"}
    environment = {"VAE_SERVER_PORT": str(port), **proxies}
    ran = subprocess.run([sys.executable, *check.argv[1:]], env=environment, stderr=subprocess.DEVNULL, timeout=30)
    return ran.returncode == 0


@pytest.mark.parametrize(("status", "is_well"), [(200, True), (204, False), (404, False), (503, False)])
def test_health_is_a_200_whatever_the_proxy(status: int, is_well: bool) -> None:
    with answering(status) as port:
        assert is_healthy(port) is is_well


def test_no_server_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    assert not is_healthy(port)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("ONBUILD RUN true", "line 2: ONBUILD: unknown instruction"),
        ("run true", "line 2: run: unknown instruction"),
        ("RUN --mount=type=cache,target=/root true", "line 2: RUN: expected a shell command, without flags"),
        ("COPY --chown=1:1 a b", "line 2: COPY: expected paths"),
        ("COPY /etc/passwd x", "line 2: COPY: expected paths"),
        ("COPY a b c", "line 2: COPY: the target of several sources must end in /"),
        ("USER nobody", "line 2: USER: expected uid:gid in numbers, got 'nobody'"),
        ("HEALTHCHECK NONE", "line 2: HEALTHCHECK: expected --interval"),
        ("ENV A B", "line 2: ENV: expected NAME=value"),
        ("VOLUME data", "line 2: VOLUME: expected one absolute path"),
    ],
)
def test_what_the_parser_does_not_know_is_an_error(line: str, sentence: str) -> None:
    with pytest.raises(DockerfileError) as caught:
        parse(f"FROM python:3.11-slim\n{line}\n")
    assert str(caught.value).startswith(sentence)


def test_a_continued_instruction_skips_comments_and_keeps_its_words() -> None:
    text = 'FROM a\n# why\nRUN one \\\n# not this\n    && two\nCMD ["x"]\n'
    assert [each for each in parse(text) if isinstance(each, Run)] == [Run("one     && two")]


@pytest.mark.parametrize(
    ("patterns", "path", "is_ignored"),
    [
        ("*", "a/b", True),
        ("*\n!a", "a/b", False),
        ("*\n!a\n**/*.pt", "a/b/c.pt", True),
        ("*\n!a\n**/.*", "a/b", False),
        ("**/x", "x", True),
        ("**/x", "a/b/x/y", True),
        ("a/*.pt", "a/b/c.pt", False),
        ("# a", "a", False),
        ("a?c", "abc", True),
        ("a.c", "abc", False),
    ],
)
def test_dockerignore_patterns_match_as_docker_matches_them(patterns: str, path: str, is_ignored: bool) -> None:
    assert Ignored(patterns).covers(PurePosixPath(path)) is is_ignored


def test_what_the_readme_names_is_there() -> None:
    text = (REPOSITORY / "deploy/README.md").read_text()
    assert set(re.findall(r"--build-arg (?:\n)?([A-Z_]{5,})=", text)) == {arg.name for arg in of_kind(Arg)}
    settings = {name.lower() for name in re.findall(r"VAE_SERVER_(\w+)", text)}
    assert settings <= ServerOptions.model_fields.keys()
    flags = {flag for option in main.params for flag in option.opts}
    assert flags == {
        flag for flag in ("--root", "--build-arg", "--env", "--bind", "--mirror", "--keep") if flag in text
    }
