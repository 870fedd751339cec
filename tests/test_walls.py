"""The walls between the packages of server/: which of them may import torch, and what their modules may be called."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SERVER = REPOSITORY / "server"
# What the front process imports. `engine` owns a device; `inprocess` and two of the commands run one in their process.
WITHOUT_TORCH = (
    *("config", "contract", "families", "ffmpeg", "inputs", "outputs", "scheduling", "web", "workers"),
    *("commands.cli", "errors", "listing", "logs", "metrics", "model_info", "values"),
)
LOOK = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), sys.argv[1] + "."):
    importlib.import_module(module.name)
print(*sorted({"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys()))
"""


def heavy_imports(name: str) -> list[str]:
    """Return which of torch and its like a fresh interpreter has after it imported all of a package."""
    found = subprocess.run(
        [sys.executable, "-c", LOOK, name], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return found.stdout.split()


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_it_imports_no_torch(name: str) -> None:
    assert heavy_imports(f"server.{name}") == []


def test_the_same_look_finds_torch_where_it_is() -> None:
    assert "torch" in heavy_imports("server.engine")


def test_every_package_is_on_one_side_of_the_wall() -> None:
    with_torch = {"engine", "inprocess", "demo", "commands"}
    top = {path.stem for path in SERVER.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top - {"__init__", "__main__"} - with_torch == {name for name in WITHOUT_TORCH if "." not in name}


def modules() -> list[Path]:
    return sorted(path.relative_to(SERVER) for path in SERVER.rglob("*.py") if not path.name.startswith("__"))


def test_nothing_has_the_name_of_a_module_of_the_standard_library() -> None:
    packages = {path.parent.name for path in SERVER.rglob("__init__.py")}
    names = packages | {path.stem for path in modules()}
    assert names & set(sys.stdlib_module_names) == set()


def test_python_starts_with_the_server_folder_as_its_working_folder() -> None:
    code = "import asyncio, http.client, inspect, types"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SERVER)


PARALLEL = (  # folders that treat two sides of one thing, file by file
    ("inputs", "outputs"),
    ("engine/coders/image", "engine/coders/video"),
    ("families", "engine/coders/video"),  # a family's layout and scaling, and its coder
)


def test_a_file_name_occurs_once_but_in_folders_that_are_parallel() -> None:
    twins = {
        name
        for one, other in PARALLEL
        for name in ({p.name for p in (SERVER / one).glob("*.py")} & {p.name for p in (SERVER / other).glob("*.py")})
    }
    counts = Counter(path.name for path in modules())
    assert {name for name, count in counts.items() if count > 1 + (name in twins)} == set()
