"""Times and memory of one call, on a GPU or a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.decode import MEGA, peak_of, synchronise
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from server.engine.device_errors import is_out_of_memory

Run = Callable[[Tensor], Tensor]
STEADY_S = 1.0
LONG_MS = 1000.0  # a call that takes longer is run only twice


@dataclass(frozen=True)
class Measured:
    """What was measured of a call.

    output: of the last run. first_ms: of the first run. second_ms: of the second run, in which graphs are recorded.
    steady_ms: the shortest of the later runs, or that of the second one if it takes longer than LONG_MS.
    real_mb: the peak of the allocated memory in MB, without the input, the output and what was there before.
    """

    output: Tensor
    first_ms: float
    second_ms: float
    steady_ms: float
    real_mb: float


def measured(report: Report, run: Run, values: Tensor) -> Measured:
    """Measure a call."""
    device = torch.device(report.device)
    first_ms = milliseconds(run, values)
    report.check_time(2 * first_ms / 1e3)
    second_ms = milliseconds(run, values)
    peak_bytes, output = peak_of(run, values, device)
    steady_ms, began = second_ms, time.monotonic()
    for _ in range(sizes_for(report.device).steady_runs if second_ms <= LONG_MS else 0):
        if time.monotonic() - began > min(STEADY_S, report.left_s / 4):
            break
        steady_ms = min(steady_ms, milliseconds(run, values))
    return Measured(output, first_ms, second_ms, steady_ms, max(0, peak_bytes - output.nbytes) / MEGA)


def milliseconds(run: Run, values: Tensor) -> float:
    """Return the time of one run, until the device has done its work."""
    synchronise(values.device)
    started = time.perf_counter()
    run(values)
    synchronise(values.device)
    return (time.perf_counter() - started) * 1e3


def refusal_of(error: Exception) -> str:
    """Return the first line of an error that means that memory ran out. Raises other errors again."""
    if not is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def free_caches(device: str) -> None:
    """Give the memory that torch caches back to a GPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
