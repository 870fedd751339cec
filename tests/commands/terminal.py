"""Run a command whose stderr is a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S


@dataclass(frozen=True)
class OnTerminal:
    """What a command printed. shown: everything that was written to the terminal."""

    returncode: int
    stdout: str
    shown: str


def on_terminal(*arguments: object, cwd: Path = REPOSITORY, **environment: str) -> OnTerminal:
    """Run `python -m server`. Its stdout is a pipe."""
    command = [sys.executable, "-m", "server", *map(str, arguments)]
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))  # progress bars of no width are empty
    written: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(master, 1 << 16):
                written.append(piece)
        except OSError:
            pass  # Linux tells the end of a terminal by an error

    reader = Thread(target=read)
    ran = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=slave, text=True
    )
    os.close(slave)
    reader.start()
    stdout, _ = ran.communicate(timeout=PATIENCE_S)
    reader.join(PATIENCE_S)
    os.close(master)
    return OnTerminal(ran.returncode, stdout, b"".join(written).decode())
