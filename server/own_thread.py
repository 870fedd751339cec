"""Work in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """Do some work in a new thread, which ends with the work. Cancelling the future has no effect on work that began.

    A thread that has run torch keeps its OpenMP workers as long as it lives. Once there are more of those than cores,
    libgomp stops spinning: a 512x512 decode of the demo model then takes 330 ms instead of 220.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # the border of a thread: the future carries the error
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
