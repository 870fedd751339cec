"""The walls between the packages of server/: which of them may import torch, and what their modules may be called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SERVER = REPOSITORY / "server"
# What the front process imports. `engine` owns a device; `inprocess` and two of the commands run one in their process.
WITHOUT_TORCH = (
    *("config", "contract", "families", "ffmpeg", "inputs", "outputs", "scheduling", "web", "workers"),
    *("cores", "errors", "listing", "logs", "memory_file", "metrics", "model_info", "own_thread", "values"),
    # The command line, as far as a command does not need torch, and what it reads models with.
    *("commands.cli", "commands.model_table", "commands.coding", "engine.weights.config_json"),
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
    assert "torch" in heavy_imports("server.engine.tensors")


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
    pairs = {frozenset(pair) for pair in PARALLEL}
    folders: dict[str, list[str]] = {}
    for path in modules():
        folders.setdefault(path.name, []).append(path.parent.as_posix())
    assert {name: found for name, found in folders.items() if len(found) > 1 and frozenset(found) not in pairs} == {}


def test_the_layout_in_the_readme_is_the_tree() -> None:
    block = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    told = [line.split("  ")[0].strip("├└─ ") for line in block.splitlines()[1:]]
    inner = [line.startswith(("├", "└")) for line in block.splitlines()[1:]]
    in_server = {name.rstrip("/") for name, is_inner in zip(told, inner, strict=True) if is_inner}
    beside = {name.rstrip("/") for name, is_inner in zip(told, inner, strict=True) if not is_inner}
    found = {path.name for path in SERVER.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert in_server == found - {"__init__.py"}
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith(".")}
    # What a test run leaves behind is not in the tree.
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=REPOSITORY, check=False).stdout
    known = {line.split("/")[0] for line in tracked.splitlines() if "/" in line} or folders
    assert beside == (folders & known) | {"handler.py", "models.yaml"}


FORMS = {"Parameters", "Job", "Request", "Pending", "Batch", "Result"}
CARRIERS = {  # what holds a request, or is told of one, and is no form of it
    ("web", "EncodeFile"): "a file to encode that is received but not read",
    ("web", "VideoWithSound"): "two decodes for one answer",
    ("web", "Streamed"): "an answer that is sent while it is computed",
    ("scheduling", "Service"): "those that wait or are computed, to tell how far they are",
    ("scheduling", "Dispatcher"): "the batches of every engine",
    ("workers", "ProcessEngine"): "the batches that a worker has",
    ("workers", "Run"): "the message to a worker",
    ("workers", "Finished"): "the message with an answer",
    ("engine", "Work"): "a batch in the worker",
    ("engine", "LoopListener"): "tells a LocalEngine's event loop what happens to a batch",
    ("engine", "VideoRender"): "a video that is rendered while it is decoded",
}


def annotations_of(body: ast.ClassDef) -> list[ast.expr]:
    """The types of a class's fields, of the arguments of __init__, and of what __init__ sets."""
    found = [node.annotation for node in body.body if isinstance(node, ast.AnnAssign)]
    for method in body.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            arguments = (*method.args.args, *method.args.kwonlyargs)
            found += [each.annotation for each in arguments if each.annotation]
            found += [node.annotation for node in ast.walk(method) if isinstance(node, ast.AnnAssign)]
    return found


def forms_held(body: ast.ClassDef, foreign: set[str]) -> set[str]:
    """The forms of a request that a class's instances hold. foreign: names that mean something of another library."""
    parts = [node for annotation in annotations_of(body) for node in ast.walk(annotation)]
    own = {node.id for node in parts if isinstance(node, ast.Name)} - foreign
    of_modules = {node.attr for node in parts if isinstance(node, ast.Attribute)}  # values.Request
    return (own | of_modules) & (FORMS | {"TensorResult", "RenderedResult"})


def carriers_in(source: str) -> set[str]:
    """The classes of a module that hold a form of a request."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    foreign = {name.asname or name.name for node in imports for name in node.names}
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and forms_held(node, foreign)}


def test_a_request_passes_through_few_classes() -> None:
    found = {
        (path.relative_to(SERVER).parts[0].removesuffix(".py"), name)
        for path in SERVER.rglob("*.py")
        for name in carriers_in(path.read_text(encoding="utf-8")) - FORMS
    }
    assert found == set(CARRIERS)


def test_the_search_for_carriers_sees_every_way_to_hold_a_request() -> None:
    source = """
from starlette.requests import Request
from .. import values
class Field: held: values.Request
class Keyword:
    def __init__(self, *, held: list[values.Job]) -> None: ...
class Set:
    def __init__(self) -> None: self.held: dict[int, Pending] = {}
class Foreign: held: Request
"""
    assert carriers_in(source) == {"Field", "Keyword", "Set"}
