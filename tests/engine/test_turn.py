"""The order in which threads get a device, when several of them give way between their steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

from server.engine.turn import Turn
from tests.conftest import PATIENCE_S
from tests.waiting import until


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_patient_thread_waits_for_all_work_that_gave_way() -> None:
    """A gives way to B, and B to A and C. When A has ended, B is still in the middle of its work."""
    turn, order = Turn(), list[str]()
    steps = {name: threading.Event() for name in "ab"}

    def waits(count: int) -> None:
        until(lambda: len(turn._waiting) == count, f"{count} waiting threads")

    def first() -> None:
        with turn:
            order.append("a begins")
            assert steps["a"].wait(PATIENCE_S)
            turn.give_way()
            order.append("a ends")

    def second() -> None:
        with turn:
            order.append("b begins")
            assert steps["b"].wait(PATIENCE_S)
            turn.give_way()
            order.append("b ends")

    def third() -> None:
        with turn:
            order.append("c")

    def patient() -> None:
        with turn.after_work():
            order.append("patient")

    threads = [started(first)]
    until(lambda: order == ["a begins"], "the first work")
    threads.append(started(patient))
    waits(1)
    threads.append(started(second))
    waits(2)
    steps["a"].set()
    until(lambda: order[-1] == "b begins", "the second work")
    threads.append(started(third))
    waits(3)
    steps["b"].set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == ["a begins", "b begins", "a ends", "c", "b ends", "patient"]
