"""The cases of `triton_cases.py`, under Triton's interpreter, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when it is first imported, which torch does early: hence a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    everything = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, env=everything, capture_output=True, text=True, cwd=CASES.parents[3], check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


@needs_triton
def test_the_triton_kernels_compute_what_the_plain_kernels_compute() -> None:
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_triton_kernels_compute_on_a_gpu_what_the_plain_kernels_compute() -> None:
    run_cases()
