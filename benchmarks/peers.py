"""Run the compared servers as real processes with the same weights. Only the one that is measured is not stopped."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import psutil

READY_S = 120.0
OURS, HOSTED = "ours", "hosted design"
LIT, LIT_BATCHED, LIT_WORKERS = "LitServe", "LitServe, batches", "LitServe, a worker a core"
OURS_WORKERS, RAY, RAY_REPLICAS = "ours, a worker a core", "ours on Ray", "ours on Ray, a replica a core"


@dataclass(frozen=True)
class Peer:
    """One server. process: the first process of its tree."""

    name: str
    port: int
    process: psutil.Process

    @property
    def may_stop(self) -> bool:
        """Whether the processes may be stopped. Ray's may not, because it kills what does not answer health checks."""
        return not self.name.startswith(RAY)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Let the server run in a context, and stop its processes afterwards.

        They must be stopped, because LitServe's batching polls its queue a thousand times per second.
        """
        self._signal("resume")
        try:
            yield
        finally:
            self._signal("suspend")

    def rss_bytes(self) -> int:
        """Return the resident memory of the process tree. Memory that processes share counts for each of them."""
        return sum(process.memory_info().rss for process in self._tree())

    def pss_bytes(self) -> int:
        """Return the proportional memory of the process tree.

        Memory that several processes share, also those of other servers, is divided among them.
        """
        return sum(process.memory_full_info().pss for process in self._tree())

    def stop(self) -> None:
        """End all processes of the server."""
        tree = self._tree()
        self._signal("resume")
        self.process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=10)
        for process in alive:
            process.kill()

    def _signal(self, verb: str) -> None:
        for process in self._tree() if self.may_stop else ():
            getattr(process, verb)()

    def _tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def commands(models_yaml: Path, dtype: str, most_clients: int) -> dict[str, list[str]]:
    """Return the arguments of each server by its name.

    This server gets a queue for all clients, because the other servers refuse no request.
    """
    config = ["--config", str(models_yaml)]
    lit = ["benchmarks.lit", *config]
    cores = str(psutil.cpu_count(logical=False) or 1)
    ours = ["server", "serve", *config, "--max-queue", str(most_clients), "--log-level", "warning"]
    ray = ["benchmarks.ray_peer", *config, "--most-clients", str(most_clients)]
    return {
        OURS: ours,
        OURS_WORKERS: [*ours, "--device", ",".join(["cpu"] * int(cores))],
        RAY: ray,
        RAY_REPLICAS: [*ray, "--replicas", cores],
        HOSTED: ["benchmarks.hosted", *config, "--dtype", dtype],
        LIT: lit,
        LIT_BATCHED: [*lit, "--batch-size", "16", "--wait-ms", "2"],
        LIT_WORKERS: [*lit, "--workers", cores, "--threads", "1"],
    }


@contextmanager
def running(models_yaml: Path, dtype: str, most_clients: int, names: Sequence[str]) -> Iterator[list[Peer]]:
    """Start the named servers, and yield them when all are ready and stopped. Ends them at the end."""
    with ExitStack() as stack:
        peers = []
        for name, arguments in commands(models_yaml, dtype, most_clients).items():
            if name in names:
                peers.append(stack.enter_context(_running(name, arguments)))
        yield peers


@contextmanager
def _running(name: str, arguments: list[str]) -> Iterator[Peer]:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", *arguments, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peer = Peer(name, port, psutil.Process(process.pid))
        try:
            if not _becomes_ready(process, port):
                log.seek(0)
                raise RuntimeError(f"{name} did not start:\n{log.read()[-3000:].decode(errors='replace')}")
            with peer.measured():
                pass
            yield peer
        finally:
            peer.stop()
            process.wait()


def _becomes_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    return False


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
