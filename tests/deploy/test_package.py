"""The wheel, as a user installs it: what is in it, and `vae-server` from another folder than the repository."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import requests
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file

from server import __version__
from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow

SAMPLE = REPOSITORY / "server" / "demo" / "latents" / "coffee.safetensors"


def tracked() -> list[str]:
    told = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in told.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build leaves files behind, and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / "source" / name)
    pip("wheel", str(folder / "source"), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (made,) = folder.glob("*.whl")
    return made


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. It sees the packages that these tests run with, for its dependencies."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    (packages_of(folder) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def packages_of(folder: Path) -> Path:
    (found,) = folder.glob("lib/python*/site-packages")
    return found


def environment(**more: str) -> dict[str, str]:
    """Without what would lead to the repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", **more}


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path) -> Any:
    """Runs a command of the environment in an empty folder, and returns what it printed."""

    def run(program: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "bin" / program), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(**more),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    return run


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if ".dist-info/" not in name}
    package = {name.replace("server/", "vae_server/", 1) for name in tracked() if name.startswith("server/")}
    left_out = {"vae_server/demo/train.py", "vae_server/demo/README.md"}
    assert left_out < package
    assert inside == package - left_out | {"vae_server/models.yaml"}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(opened.read(name).decode())


def listed_in(*names: str) -> set[str]:
    lines = [line for name in names for line in (REPOSITORY / name).read_text().splitlines()]
    return {without_marker(line) for line in lines if line and line[0] != "#"}


def without_marker(line: str) -> str:
    requirement = Requirement(line)
    requirement.marker = None
    return str(requirement)


@pytest.mark.parametrize(
    ("extra", "files"),
    [
        (None, ("requirements.txt",)),
        ("advertise", ("requirements-advertise.txt",)),
        ("otel", ("requirements-otel.txt",)),
        ("ray", ("deploy/ray-requirements.txt",)),
        ("dev", ("requirements-dev.txt", "deploy/ray-requirements.txt")),
    ],
)
def test_its_dependencies_are_those_of_the_lists(wheel: Path, extra: str | None, files: tuple[str, ...]) -> None:
    needed = metadata(wheel).get_all("Requires-Dist", [])
    found = [line for line in needed if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)]
    assert {without_marker(line) for line in found} == listed_in(*files)


def test_nothing_named_server_is_installed(installed: Path, elsewhere: Any) -> None:
    names = {path.name for path in packages_of(installed).iterdir()}
    assert names - {"__pycache__"} == {"vae_server", f"vae_server-{__version__}.dist-info", "others.pth"}
    assert "No module named 'server'" in elsewhere("python", "-c", "import server").stderr
    assert sorted(path.name for path in (installed / "bin").glob("vae*")) == ["vae-server"]


def test_the_command_says_its_version(elsewhere: Any, wheel: Path) -> None:
    assert elsewhere("vae-server", "--version").stdout == f"vae-server, version {__version__}\n"
    assert metadata(wheel)["Version"] == __version__
    assert elsewhere("python", "-m", "vae_server", "--version").stdout.endswith(f"version {__version__}\n")


def test_it_lists_and_checks_the_models_that_come_with_it(elsewhere: Any) -> None:
    listed = {model["name"]: model for model in json.loads(elsewhere("vae-server", "models", "--json").stdout)}
    assert listed["demo"]["weights"]["is_here"]
    assert len(listed) > 25
    assert "run `vae-server download flux`" in elsewhere("vae-server", "models", "flux").stdout
    ran = elsewhere("vae-server", "check", "demo")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'demo' decodes in" in ran.stdout


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `vae-server serve`, with the embedded model."""
    command = [str(installed / "bin" / "vae-server"), "serve", "--port", "0", "--log-level", "warning"]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert running.stderr
    try:
        told = []
        while not (line := running.stderr.readline()).startswith("ready: "):
            assert line, told
            told.append(line)
        yield line.split()[1]
    finally:
        running.terminate()
        running.communicate(timeout=PATIENCE_S)


def test_it_serves_the_embedded_model_and_its_commands_find_the_server(
    server: str, elsewhere: Any, tmp_path: Path
) -> None:
    latents = load_file(SAMPLE)["latents"]
    query = {"shape": list(latents.shape), "dtype": "float16", "do_scaling": "true", "image_format": "png"}
    answer = requests.post(server, params=query, data=latents.numpy().tobytes(), timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == (512, 512)
    for file in ("", "page/page.js", "page/coffee.safetensors", "openapi.json"):
        assert requests.get(server + file, headers={"Accept": "text/html"}, timeout=PATIENCE_S).status_code == 200

    port = server.rstrip("/").rpartition(":")[2]
    told = json.loads(elsewhere("vae-server", "decode", SAMPLE, "out.png", "--json", VAE_SERVER_PORT=port).stdout)
    assert (told["server"], told["model"], told["width"], told["height"]) == (server, "demo", 512, 512)
    assert (tmp_path / "out.png").read_bytes() == answer.content
    ran = elsewhere("vae-server", "encode", "out.png", "again.safetensors", "--server", server)
    assert ran.returncode == 0, ran.stderr
    assert load_file(tmp_path / "again.safetensors")["latents"].shape == latents.shape


def test_it_decodes_and_encodes_without_a_server(elsewhere: Any, tmp_path: Path) -> None:
    for arguments in (("decode", SAMPLE, "out.png"), ("encode", "out.png", "again.safetensors")):
        ran = elsewhere("vae-server", *arguments, "--no-server")
        assert ran.returncode == 0, ran.stderr
    assert load_file(tmp_path / "again.safetensors")["latents"].shape == (1, 4, 64, 64)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, which completes the words")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mod"], {"models"}),
        (["serve", "--cors"], {"--cors-origins"}),
        (["models", "taes"], {"taesd", "taesdxl", "taesd3"}),
        (["decode", "--model", "sd-x"], {"sd-xl"}),
    ],
)
def test_bash_completes_commands_options_and_models(
    installed: Path, elsewhere: Any, words: list[str], expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "script").write_text(elsewhere("vae-server", "completion", "bash").stdout)
    program = installed / "bin" / "vae-server"
    script = f"source ./script; COMP_WORDS=({program} {' '.join(words)}); COMP_CWORD={len(words)}; _vae_server_completion {program}"
    command = ["bash", "-c", f'{script}; printf "%s\\n" "${{COMPREPLY[@]}}"']
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) == expected, ran.stderr
