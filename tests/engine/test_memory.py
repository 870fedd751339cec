"""The memory of a container counts, not only that of its machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine import memory
from server.engine.memory import container_bytes, free_bytes


def control_group(folder: Path, limit: str, used: int, inactive: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive}\n")
    return folder


def test_what_the_limit_leaves_and_file_pages_that_can_be_taken_away(tmp_path: Path) -> None:
    assert container_bytes(control_group(tmp_path, str(2 << 30), 1 << 30, 100 << 20)) == (1 << 30) + (100 << 20)


def test_more_than_the_limit_is_nothing_left(tmp_path: Path) -> None:
    assert container_bytes(control_group(tmp_path, "1000", 5000, 10)) == 0


@pytest.mark.parametrize("limit", ["max", "unreadable"])
def test_no_limit(tmp_path: Path, limit: str) -> None:
    assert container_bytes(control_group(tmp_path, limit, 1, 1)) == float("inf")


def test_no_control_group(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == float("inf")


def test_a_run_plans_with_what_the_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = control_group(tmp_path, str(64 << 20), 0, 0)
    monkeypatch.setattr(memory, "container_bytes", lambda: container_bytes(root))
    assert free_bytes(torch.device("cpu")) == int(memory.FREE_MEMORY_SHARE * (64 << 20))
