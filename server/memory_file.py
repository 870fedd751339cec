"""Files in memory, for programs and libraries that work on files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple


class MemoryFile(NamedTuple):
    """A new file.

    path: by which this process can open it again. descriptors: those that a child must inherit to open it by this path.
    """

    file: IO[bytes]
    path: Path
    descriptors: tuple[int, ...]


@contextmanager
def memory_file() -> Iterator[MemoryFile]:
    """Create a file, open for reading and writing without a buffer.

    On Linux it is in memory, so that it fills no disk and nothing is left behind if this process is killed. Elsewhere
    it is a temporary one.
    """
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("vae"), "w+b", buffering=0) as file:
            yield MemoryFile(file, Path(f"/proc/self/fd/{file.fileno()}"), (file.fileno(),))
    else:
        with tempfile.TemporaryDirectory(prefix="vae-") as folder:
            path = Path(folder) / "file"
            with path.open("w+b", buffering=0) as file:
                yield MemoryFile(file, path, ())
