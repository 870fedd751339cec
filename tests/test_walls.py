"""The front process never imports torch: a fresh interpreter imports all that it runs, and looks."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import server
from tests.conftest import REPOSITORY

# What computes, or runs in a process that does.
WITH_TORCH = ("server.engine.", "server.demo.", "server.direct", "server.inspect", "server.toolkit")
FRONT_OF_ENGINE = ("server.engine.process", "server.engine.messages")
FRONT = sorted(
    module.name
    for module in pkgutil.walk_packages(server.__path__, "server.")
    if not module.name.startswith(WITH_TORCH) and module.name != "server.__main__"
)
LOOK = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted({"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys()))
"""


def test_the_front_process_imports_no_torch() -> None:
    command = [sys.executable, "-c", LOOK, *FRONT, *FRONT_OF_ENGINE]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout.split() == []


def test_the_look_would_find_it() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOOK, "server.engine.worker"], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "torch" in found.stdout.split()


@pytest.mark.parametrize("name", ["server.service", "server.dispatch", "server.http.routes", "server.families.kl"])
def test_the_list_holds_what_it_should(name: str) -> None:
    assert name in FRONT
