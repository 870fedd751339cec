"""Replace this process with another program, within limits.

    python launcher.py PARENT MEMORY_BYTES CPU_S PROGRAM ARGUMENT...

The limits are set before the program starts; 0 means no limit. On Linux the kernel kills the program when the process
with the id PARENT ends.

Python code between fork and exec (`preexec_fn`) could do the same, but can deadlock if the parent has threads. Starting
this script costs about 15 ms instead. It imports nothing from the server, because it runs as a file.
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
    """Replace this process with `command`, without passing on environment variables."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent ended before the line above took effect
        sys.exit(1)
    for kind, most in ((resource.RLIMIT_AS, int(memory_bytes)), (resource.RLIMIT_CPU, int(cpu_s))):
        if most:
            with suppress(ValueError, OSError):  # macOS has no RLIMIT_AS; elsewhere a lower limit may be set already
                resource.setrlimit(kind, (most, most))
    # Without this, glibc reserves address space for each thread: twice as much as decoding 1080p takes.
    environment = {"MALLOC_ARENA_MAX": "1"} if int(memory_bytes) else {}
    os.execve(command[0], command, environment)  # noqa: S606  # runs without a shell


if __name__ == "__main__":
    main(*sys.argv[1:])
