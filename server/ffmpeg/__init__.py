"""Run ffmpeg in its own process, within limits and without the environment variables of this process.

On Linux the kernel kills ffmpeg when this process ends.
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
# The launcher gets this variable, because its Python may need it to find libpython. ffmpeg does not get it.
KEPT_VARIABLES = ("LD_LIBRARY_PATH",)


def executable() -> str:
    """Return the path of ffmpeg. Raises RuntimeError if there is no ffmpeg.

    The first call runs ffmpeg once to check that it works, in the process group of this process. A server should
    therefore call this before it serves.
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

    stdin, stdout, stderr: as in `subprocess.Popen`; nothing is connected by default.
    files: file descriptors that ffmpeg inherits.
    memory_bytes, cpu_s: the most address space and processor time that ffmpeg may take; it fails if it needs more. 0
        means no limit.

    ffmpeg gets no environment variable of this process, and therefore no API key.
    """
    limits = str(os.getpid()), str(memory_bytes), str(cpu_s)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER), *limits, executable(), "-nostdin", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=files,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        # A process group of its own: Ctrl-C signals the group of this process, which then still finishes its videos.
        process_group=0,
    )
