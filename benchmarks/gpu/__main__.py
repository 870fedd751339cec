"""Report what a GPU does with this server: rates, times, memory, errors. It takes at most `--minutes`.

    python -m benchmarks.gpu [--minutes 9] [--only SECTION …] [--folder FOLDER]
    python -m benchmarks.gpu --device cpu --minutes 1

Every result is one line, written to disk at once: to FOLDER/gpu-NAME.json, which has one JSON object on each line, and
to the table FOLDER/gpu-NAME.md. Every section has a share of the minutes and runs in a process of its own. A section
that fails, or whose time is up, gets a line that says so, and the next one begins.

With `--device cpu` the same sections run at small sizes, as a test of this program. Their lines are marked "cpu" and
say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.gpu.processes import check, run_section
from benchmarks.gpu.report import HEADER, Report, append

RESULTS = Path(__file__).resolve().parent.parent / "results"
# The modules of the sections, and the share of the minutes that each has. Time that is left goes to those that follow.
SHARES = {
    "hardware": 15,
    "suite": 130,
    "images": 90,
    "videos": 150,
    "shapes": 20,
    "memory": 45,
    "four_models": 25,
    "overlap": 15,
    "serving": 60,
    "lost_device": 45,
}
# On a CPU the sizes are small, and most of the time goes to the starts of two servers.
CPU_SHARES = {
    "hardware": 3,
    "suite": 3,
    "images": 3,
    "videos": 9,
    "shapes": 3,
    "memory": 6,
    "four_models": 4,
    "overlap": 3,
    "serving": 16,
    "lost_device": 12,
}
# Imported once, before the processes of the sections are forked. No device is used then.
PRELOADED = ("benchmarks.gpu.vaes", "server.inprocess.direct", "tests.load")
# A section that does not end by itself is killed so long after its deadline, but at most this share of its time.
GRACE_S, GRACE_SHARE = 5.0, 0.1


def main() -> int:
    """Run the report from the command line. Return the exit status: 2 if there is no such device."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="the longest time of the whole report")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="SECTION")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the process of a section is ended

    # Otherwise a library that asks for CUDA while it is imported would make CUDA unusable in forked processes.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        os.environ["TMPDIR"] = temporary  # so that nothing stays of a section that is killed
        return run_sections(arguments, started)


def run_sections(arguments: argparse.Namespace, started: float) -> int:
    """Run the sections one after the other, and return the exit status. started: as `time.monotonic()`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(PRELOADED))
    checking = processes.Process(target=check, args=(arguments.device,))
    checking.start()
    checking.join()
    if checking.exitcode:
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"gpu-{arguments.device}-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    append(path.with_suffix(".md"), HEADER)
    print(HEADER, flush=True)
    end, names = started + 60 * arguments.minutes, [name for name in SHARES if name in arguments.only]
    shares = CPU_SHARES if arguments.device == "cpu" else SHARES
    for index, name in enumerate(names):
        share = shares[name] / sum(shares[other] for other in names[index:])
        given_s = share * (end - time.monotonic())
        killed_at = time.monotonic() + given_s
        report = Report(arguments.device, name, path, killed_at - min(GRACE_S, GRACE_SHARE * given_s))
        process = processes.Process(target=run_section, args=(report,))
        process.start()
        wait_for(process, report, killed_at)
    print(f"\n{path}\n{path.with_suffix('.md')}")
    return 0


def wait_for(process: BaseProcess, report: Report, killed_at: float) -> None:
    """Wait until the process of a section ends, kill it and all its descendants at a time, and note how it ended."""
    assert process.pid is not None
    try:
        process.join(max(0.0, killed_at - time.monotonic()))
        was_late = process.exitcode is None
    finally:
        with suppress(ProcessLookupError):  # the processes that the section started, if they are still there
            os.killpg(process.pid, signal.SIGKILL)
        if process.exitcode is None:
            process.kill()
        process.join(GRACE_S)  # a process that waits for a broken driver may not end at all
    if was_late:
        report.line("stopped", note="killed, because it did not end when its time was up")
    elif process.exitcode:
        report.line("failed", error=f"the process of the section ended with {process.exitcode}")


if __name__ == "__main__":
    sys.exit(main())
