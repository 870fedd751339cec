"""The cases of `triton_cases.py`, on a GPU if there is one, else under Triton's interpreter.

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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_compute_what_the_plain_kernels_compute() -> None:
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    )
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[3], check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
