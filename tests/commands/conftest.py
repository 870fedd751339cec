"""Files for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.vaes import LocalVae


@pytest.fixture
def latents_file(vaes: dict[str, LocalVae], tmp_path: Path) -> Path:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": vaes["sd"].latents(8, 12).half()}, path)
    return path


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing depend on the terminal from which the tests are started."""
    monkeypatch.setenv("TERM", "xterm")
