"""Clients that are generated from /openapi.json, as their users make and use them, against a real server process."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from tests.conftest import REPOSITORY
from tests.load import process
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow

PROGRAMS = REPOSITORY / "tests" / "clients" / "generated"
TOOLS = Path(sys.prefix) / "clients"  # `make generated-clients` installs them there
KEY = "secret"
LATENTS: dict[str, Any] = {"shape": [1, 4, 8, 8], "dtype": "float32"}


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """Skip these tests if the generators are not installed, except in continuous integration, which must run them."""
    if not (TOOLS / ".installed").exists():
        missing = f"no generators in {TOOLS}: make generated-clients"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture(scope="module")
def server(models_yaml: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_SERVER_API_KEY", KEY)
        with process(models_yaml) as (url, _):
            yield url


@pytest.fixture
def folder(server: str, vaes: dict[str, LocalVae], tmp_path: Path) -> Path:
    """A user's folder: the description, latents, and an image."""
    described = requests.get(f"{server}openapi.json", headers={"X-API-Key": KEY}, timeout=PATIENCE_S)
    (tmp_path / "openapi.json").write_bytes(described.content)
    (tmp_path / "latents").write_bytes(vaes["sd"].latents(8, 8).numpy().tobytes())
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path


def run(*command: str | Path, folder: Path) -> str:
    """Run a program of the tools, and return what it printed."""
    environment = {**os.environ, "PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}"}  # they run ruff and node
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check(server: str, folder: Path, told: dict[str, Any], request_id: str) -> None:
    """Compare what a generated client received with the answers to plain requests."""

    def asked(path: str, data: bytes, **query: Any) -> requests.Response:
        answer = requests.post(server + path, params=query, data=data, headers={"X-API-Key": KEY}, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return answer

    latents, image = ((folder / name).read_bytes() for name in ("latents", "image.png"))
    expected = asked("", latents, **LATENTS, scaling_factor=0.5, image_format="png")
    with Image.open(folder / "decoded.png") as decoded, Image.open(io.BytesIO(expected.content)) as wanted:
        assert decoded.size == (64, 64)
        assert np.array_equal(np.asarray(decoded), np.asarray(wanted))
    tensor = asked("sd", latents, **LATENTS, output_type="pt")
    assert (folder / "tensor").read_bytes() == tensor.content
    assert told["tensor"] == ["[1, 3, 64, 64]", "float32", request_id]
    encoded = asked("encode", image, do_scaling=True)
    assert (folder / "encoded").read_bytes() == encoded.content
    assert told["encoded"] == ["[1, 4, 8, 6]", "float32"]
    assert (told["refused"], told["models"]) == ("wrong_length", ["sd"])


def test_a_python_client_decodes_and_encodes(server: str, folder: Path) -> None:
    run(TOOLS / "bin" / "openapi-python-client", "generate", "--path", "openapi.json", "--output-path", "made",
        "--fail-on-warning", folder=folder)  # fmt: skip
    shutil.copy(PROGRAMS / "client.py", folder / "made")  # beside the package, from where Python imports it
    told = run(TOOLS / "bin" / "python", folder / "made" / "client.py", server, KEY, folder, folder=folder)
    check(server, folder, json.loads(told), "from-python")


def test_a_typescript_client_decodes_and_encodes(server: str, folder: Path) -> None:
    for name in ("package.json", "tsconfig.json", "client.ts"):
        shutil.copy(PROGRAMS / name, folder)
    (folder / "node_modules").symlink_to(TOOLS / "node_modules")
    installed = TOOLS / "node_modules" / ".bin"
    run(installed / "openapi-typescript", "openapi.json", "--output", "schema.ts", folder=folder)
    run(installed / "tsc", "--project", ".", folder=folder)
    told = run(TOOLS / "bin" / "node", "client.ts", server, KEY, folder, folder=folder)
    check(server, folder, json.loads(told), "from-typescript")
