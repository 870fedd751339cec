"""`make gpu-report` on a CPU, where it tests itself: every section measures something, and nothing fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import SHARES
from benchmarks.gpu.report import OutOfTime, Report
from tests.conftest import REPOSITORY

MINUTES = 1.0
ENDINGS = {"done", "stopped", "failed"}  # the cases of lines about a whole section


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(folder: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Run the report, and return its lines and its table."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--folder", str(folder), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    (path,) = folder.glob("gpu-cpu-*.json")
    return lines_of(path), path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_section_measures_something_on_a_cpu_and_none_fails(tmp_path: Path) -> None:
    started = time.monotonic()
    lines, table = report(tmp_path, "--minutes", str(MINUTES))
    assert time.monotonic() - started < 60 * MINUTES + 15, "sections end when their time is up"
    assert {line["device"] for line in lines} == {"cpu"}
    assert [line for line in lines if "error" in line] == []
    assert {line["section"] for line in lines if line["case"] not in ENDINGS} == set(SHARES)
    assert len(table.splitlines()) == len(lines) + 2, "a row for each line, below the header"


@pytest.mark.slow
def test_a_section_whose_time_is_up_says_so_and_the_next_one_begins(tmp_path: Path) -> None:
    lines, _ = report(tmp_path, "--minutes", "0.01", "--only", "shapes", "hardware")
    assert [(line["section"], line["case"]) for line in lines if line["case"] in ENDINGS] == [
        ("hardware", "stopped"),
        ("shapes", "stopped"),
    ]


def test_without_a_gpu_the_report_ends_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cuda", "--folder", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "sees no CUDA device; use --device cpu" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_in_both_files_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Report("cpu", "images", path, time.monotonic() + 60).line(
        "64x64", ms=1.23456, psnr_db=float("inf"), steps=[], note=None
    )
    assert lines_of(path) == [
        {"device": "cpu", "section": "images", "case": "64x64", "ms": 1.23456, "psnr_db": "inf", "steps": []}
    ]
    assert path.with_suffix(".md").read_text() == "| cpu | images | 64x64 | ms 1.235, psnr_db inf, steps none |\n"


def test_no_measurement_begins_that_would_outlast_the_section(tmp_path: Path) -> None:
    soon = Report("cpu", "images", tmp_path / "gpu.json", time.monotonic() + 60)
    soon.check_time(30)
    with pytest.raises(OutOfTime):
        soon.check_time(90)
