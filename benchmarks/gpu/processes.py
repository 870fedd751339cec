"""What the processes of the report run."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from importlib import import_module

from benchmarks.gpu.report import OutOfTime, Report


def check(device: str) -> None:
    """End this process with the status 2 if there is no such device."""
    from server.engine.weights.placement import choose_device

    try:
        choose_device(device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def run_section(report: Report) -> None:
    """Run one section in this process, which has a process group of its own."""
    os.setsid()
    gc.freeze()  # what is imported need not be looked at by every collection before a peak is measured
    started = time.monotonic()
    try:
        import_module(f"benchmarks.gpu.{report.section}").run(report)
        report.line("done", s=time.monotonic() - started)
    except OutOfTime:
        report.line("stopped", note="its time was up")
    except Exception as error:  # noqa: BLE001  # whatever a section raises, the next one must run
        traceback.print_exc()
        report.line("failed", error=f"{type(error).__name__}: {error}"[:500])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # CUDA's own clean-up may hang after an error of the device
