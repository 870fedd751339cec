"""Become another program, within limits: `python launcher.py PARENT MEMORY_BYTES CPU_S PROGRAM ARGUMENT...`.

The limits are set before the program starts. On Linux the kernel kills it when PARENT ends. Python code between
fork and exec (`preexec_fn`) could do the same, but it can deadlock where the parent has threads; hence a process of its
own, which replaces itself and costs some 15 ms. A limit of 0 is none. Imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def main(parent: str, memory_bytes: str, cpu_s: str, *command: str) -> None:
    """Replace this process by `command`, with none of its environment."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the line above
        sys.exit(1)
    for kind, most in ((resource.RLIMIT_AS, int(memory_bytes)), (resource.RLIMIT_CPU, int(cpu_s))):
        if most:
            with suppress(ValueError, OSError):  # macOS has no RLIMIT_AS, and a lower limit may hold already
                resource.setrlimit(kind, (most, most))
    # glibc reserves address space for each thread otherwise: twice as much as decoding 1080p takes.
    environment = {"MALLOC_ARENA_MAX": "1"} if int(memory_bytes) else {}
    os.execve(command[0], command, environment)  # noqa: S606  # no shell


if __name__ == "__main__":
    main(*sys.argv[1:])
