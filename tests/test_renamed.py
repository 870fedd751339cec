"""The package works under another name, as in an installed wheel: its imports are relative."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, write_models_yaml
from tests.load import process
from tests.waiting import PATIENCE_S

SAMPLE = REPOSITORY / "server" / "demo" / "latents" / "coffee.safetensors"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with the package as `vae_server`, and nothing named `server` in it."""
    shutil.copytree(REPOSITORY / "server", tmp_path / "vae_server", ignore=shutil.ignore_patterns("__pycache__"))
    write_models_yaml(tmp_path / "models.yaml", {"demo": {"repo": "./vae_server/demo"}}, "demo")
    return tmp_path


def test_a_renamed_package_serves_from_its_worker_process(elsewhere: Path) -> None:
    latents = load_file(SAMPLE)["latents"]
    query = {"shape": list(latents.shape), "dtype": "float16", "do_scaling": "true", "image_format": "png"}
    with process(elsewhere / "models.yaml", package="vae_server", folder=elsewhere) as (url, _):
        answer = requests.post(url, params=query, data=latents.numpy().tobytes(), timeout=PATIENCE_S)
    assert answer.status_code == 200
    assert answer.content.startswith(b"\x89PNG")


def test_a_renamed_package_decodes_where_the_old_name_cannot_be_imported(elsewhere: Path) -> None:
    code = "import sys, runpy; sys.modules['server'] = None; runpy.run_module('vae_server', run_name='__main__')"
    command = [sys.executable, "-c", code, "decode", str(SAMPLE), "out.png", "--no-server"]
    subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True)
    assert (elsewhere / "out.png").read_bytes().startswith(b"\x89PNG")


def test_no_module_of_the_package_names_it() -> None:
    absolute = []
    for path in (REPOSITORY / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "server":
                absolute.append(f"{path.name}: {node.module}")
            if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "server" for name in node.names):
                absolute.append(path.name)
    assert absolute == []
