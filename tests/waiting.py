"""How tests wait: for an event, and so long that a busy machine does not fail them."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # of a test for what comes within seconds on a quiet machine


def until(holds: Callable[[], bool], what: str = "it", pause_s: float = 0.02) -> None:
    """Wait until this is so. what: for the message of the failure."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(pause_s)
