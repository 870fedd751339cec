"""Say on a terminal what the program is doing, and for how long."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TextIO

PERIOD_S = 0.2
START_OF_LINE = "\r\x1b[K"  # go to the first column, and erase the line


class StatusLine:
    """The last line of a terminal, which is rewritten while something is done. Nothing is written to a file or pipe.

    A context manager: at its end the line is empty again.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Prepare a line. stream: where to write; stderr if None."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        self._dots = "…" if can_encode("…", self._stream) else "..."
        self._lock = threading.Lock()
        self._what: str | None = None
        self._detail: Callable[[], str] | None = None
        self._began = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._rewrite, daemon=True)

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._is_terminal:
            self._thread.join()
        self.clear()

    @contextmanager
    def doing(self, what: str, detail: Callable[[], str] | None = None) -> Iterator[None]:
        """Show in the line what is done in this context.

        detail: returns a text about how far it is. It is called on another thread, and only on a terminal.
        """
        with self._lock:
            self._what, self._detail, self._began = what, detail, time.monotonic()
        self._write("")
        try:
            yield
        finally:
            with self._lock:
                self._what = self._detail = None
            self.clear()

    def clear(self) -> None:
        """Empty the line, before something else is printed."""
        if self._is_terminal:
            with self._lock:
                self._stream.write(START_OF_LINE)
                self._stream.flush()

    def _write(self, detail: str) -> None:
        with self._lock:
            if self._is_terminal and self._what is not None:
                seconds = time.monotonic() - self._began
                more = detail and f", {detail}"
                self._stream.write(f"{START_OF_LINE}{self._what} {self._dots} {seconds:.0f} s{more}")
                self._stream.flush()

    def _rewrite(self) -> None:
        while not self._done.wait(PERIOD_S):
            ask = self._detail
            self._write(ask() if ask else "")


def can_encode(text: str, stream: TextIO) -> bool:
    """Return whether a stream can write a text as it is."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
