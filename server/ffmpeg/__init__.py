"""Run ffmpeg in its own process, without this process's environment and within limits.

On Linux the kernel kills it when this process ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import imageio_ffmpeg

LAUNCHER = Path(__file__).with_name("launcher.py")
# The launcher's, which may need the path to Python's own library.
KEPT_VARIABLES = ("LD_LIBRARY_PATH",)


def executable() -> str:
    """Return ffmpeg's path. Raises RuntimeError where there is none.

    The first call runs it, in this process's group, to see whether it works: a server calls it before it serves.
    """
    path: str = imageio_ffmpeg.get_ffmpeg_exe()
    return path


def start(
    arguments: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    files: Sequence[int] = (),
    memory_bytes: int = 0,
    cpu_s: int = 0,
) -> subprocess.Popen[bytes]:
    """Start ffmpeg with these arguments.

    files: descriptors that it inherits. memory_bytes, cpu_s: the most address space and processor time that it may
    take; past them it fails. 0 is no limit. No variable of this process reaches it, and so no API key.
    """
    limits = str(os.getpid()), str(memory_bytes), str(cpu_s)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER), *limits, executable(), "-nostdin", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=files,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        process_group=0,  # a signal to this process's group, as Ctrl-C sends it, drains: accepted videos are finished
    )
