"""How many CPU cores this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def allowed_cores() -> int:
    """Return the number of cores that the process may run on, which torch uses."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Return the number of cores that it can keep busy: a container's limit on CPU time counts like fewer cores."""
    cores = allowed_cores()
    with suppress(OSError, ValueError):  # ValueError: "max"
        quota, period = map(int, CGROUP_LIMIT.read_text().split())
        cores = min(cores, max(1, round(quota / period)))
    return cores


def usual_render_threads(workers: int = 1) -> int:
    """Return how many threads of each worker render images, and as many videos: half of its cores, 2 to 8."""
    return min(8, max(2, usable_cores() // (2 * workers)))
