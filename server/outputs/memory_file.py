"""Files that are in memory where the system has them, so that they fill no disk and nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from typing import IO


def file_in_memory() -> IO[bytes]:
    """Return a new file, open for reading and writing. On Linux it is in memory; it is gone once it is closed."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("answer"), "w+b")
    return tempfile.TemporaryFile()
