"""Start the processes of workers: forked from a process that has imported torch, or new ones."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver as forkserver
import multiprocessing.resource_tracker as resource_tracker
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

WORKER = f"{__package__.partition('.')[0]}.engine.worker"

# How often an OpenMP thread checks for work before it sleeps. libgomp's default of 300,000 checks takes about 10 ms.
# When another process takes a core, every parallel region of a decode waits that long for its preempted thread. On two
# cores and with 8,000 checks, a 512x512 decode of the demo takes 7 % longer on an idle machine, and half as long beside
# a busy process.
SPIN_COUNT = "8000"

# Workers are forked from a process that has imported torch but has not used a device. So a worker restarts within a
# second, and all workers share the memory of the libraries.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([WORKER])
# A library that asks for CUDA devices while it is imported would make CUDA unusable in all processes that are forked
# afterwards. With this variable torch asks NVML instead, which does not. Workers remove it, because NVML also counts
# devices that do not work.
ASKS_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
# Where there is no NVML, a worker may end with this status. The next ones import everything themselves.
UNUSABLE_FORK_STATUS = 71
SPAWNED = multiprocessing.get_context("spawn")
ENDINGS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def start_forkserver() -> None:
    """Start the process that forks the workers, before the first worker needs it, because its imports take seconds.

    Must be called on the main thread. The fork server and its workers block SIGINT, SIGTERM and SIGHUP, because a
    signal to the process group is meant for the front process. Signals that are blocked here stay blocked in the new
    process. Ignoring the signals instead would lose one that this process gets in the meantime.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # libgomp reads it when it is loaded
    os.environ.setdefault(ASKS_NVML, "1")
    resource_tracker.ensure_running()  # otherwise the fork server would start it, which unblocks the signals
    with blocked_signals():
        forkserver.ensure_running()


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Let the processes that this thread starts meanwhile block the signals that end a server."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def start_process(process: BaseProcess) -> None:
    """Start a process that blocks the signals that end a server."""
    with blocked_signals():
        process.start()
