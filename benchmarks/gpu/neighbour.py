"""A second process that occupies the memory of a device until its standard input is closed.

python -m benchmarks.gpu.neighbour cuda LEFT_BYTES    # occupy all but so many bytes of a GPU
python -m benchmarks.gpu.neighbour cpu BYTES          # occupy so many bytes
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEBI = 1 << 20
ON_CPU_BYTES = 64 * MEBI


def main(device: str, size: int) -> None:
    """Occupy the memory, print how many bytes it is, and wait."""
    held: Any
    if device == "cuda":
        import torch

        torch.zeros(1, device=device)  # the context of this process takes memory too
        free, _ = torch.cuda.mem_get_info()
        held = None
        while held is None:
            try:
                held = torch.empty(max(0, free - size), dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:  # not all that is free is in one piece
                free -= 64 * MEBI
        print(held.numel(), flush=True)
    else:
        held = bytearray(size)
        print(len(held), flush=True)
    sys.stdin.read()


@contextmanager
def little_memory(device: str, left_mb: int) -> Iterator[float]:
    """Leave so little memory on a device, in MiB, in a context. Yields how many MB the other process holds.

    The memory of a CPU is not filled. There the other process is small, and this process may not grow by more than what
    is left.
    """
    size = left_mb * MEBI if device == "cuda" else ON_CPU_BYTES
    if device == "cuda":  # what this process caches, the other one may take
        import torch

        torch.cuda.empty_cache()
    command = [sys.executable, "-m", "benchmarks.gpu.neighbour", device, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
        assert neighbour.stdin
        assert neighbour.stdout
        usual = resource.getrlimit(resource.RLIMIT_AS)
        try:
            told = neighbour.stdout.readline()
            if not told.strip():
                raise RuntimeError("the process that occupies memory ended")
            if device == "cpu":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + left_mb * MEBI, usual[1]))
            yield int(told) / 1e6
        finally:
            resource.setrlimit(resource.RLIMIT_AS, usual)
            neighbour.stdin.close()
            neighbour.wait(30)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
