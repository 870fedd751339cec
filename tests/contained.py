"""Run a command so that nothing which it starts outlives the test: `python contained.py COMMAND...`.

Every descendant becomes this process's child once its own parent ends, also one in a session of its own, and is ended
together with this process: when the command ends, or when the test process closes standard input or dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36
FOR_THE_COMMAND = (signal.SIGINT, signal.SIGTERM)


def main(command: list[str]) -> int:
    """Return the command's exit status, as a shell tells it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for passed_on in FOR_THE_COMMAND:
        signal.signal(passed_on, lambda number, _: running.send_signal(number))
    threading.Thread(target=end_with_the_test, args=(running,), daemon=True).start()
    status = running.wait()
    end_descendants()
    return status if status >= 0 else 128 - status


def end_with_the_test(running: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    running.kill()


def end_descendants() -> None:
    """Kill until there is none: one may start another meanwhile."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
