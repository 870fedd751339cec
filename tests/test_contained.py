"""contained.py: nothing that a test starts outlives it, and signals reach what tests start."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.conftest import REPOSITORY

CONTAINED = [sys.executable, str(REPOSITORY / "tests" / "contained.py"), sys.executable, "-c"]
# Starts a process in a session of its own, and tells its number.
DAEMON = "import subprocess, sys; print(subprocess.Popen(['sleep', '999'], start_new_session=True).pid, flush=True);"

Start = Callable[[str], tuple[subprocess.Popen[str], int]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(then: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [*CONTAINED, DAEMON + then], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout
        return process, int(process.stdout.readline())

    yield begin
    for process in started:
        with process:
            pass


def test_a_daemon_ends_with_its_command(start: Start) -> None:
    process, daemon = start("sys.exit(3)")
    assert process.wait() == 3
    assert not psutil.pid_exists(daemon)


def test_a_daemon_ends_with_the_test_that_started_it(start: Start) -> None:
    process, daemon = start("subprocess.run(['sleep', '999'])")
    assert psutil.pid_exists(daemon)
    assert process.stdin
    process.stdin.close()
    process.wait()
    assert not psutil.pid_exists(daemon)


def test_child_processes_take_signals_that_a_shell_had_the_tests_ignore() -> None:
    """As in `nohup make test &`."""
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "from tests.conftest import take_default_signals; take_default_signals();"
        "child = subprocess.Popen(['sleep', '999']); child.send_signal(signal.SIGINT); sys.exit(-child.wait())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == signal.SIGINT
