"""How a worker process ended, in words."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

OOM_KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))  # each has a line `oom_kill N`


def how_it_ended(code: int, was_out_of_memory: bool) -> str:
    """Return in words how a process ended.

    code: its exit code, negative for a signal. was_out_of_memory: whether the kernel killed a process for lack of
        memory meanwhile.
    """
    if code == -signal.SIGKILL and was_out_of_memory:
        return "the kernel killed it because memory ran out; lower memory_budget_mb or max_pixels"
    if code == -signal.SIGKILL:
        return "another process killed it (signal 9)"
    if code < 0:
        return f"it crashed ({signal.strsignal(-code)}, signal {-code})"
    return f"it exited with status {code}"


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory, in this container or on this machine.

    Returns 0 if that is not known.
    """
    for path in OOM_KILLS:
        with suppress(OSError, ValueError, KeyError):
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts["oom_kill"])
    return 0
