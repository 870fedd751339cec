"""A lock for a device, which threads get in the order in which they ask for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Waiter:
    """A thread that waits in the line of a Turn.

    is_patient: it waits until the current work has ended, and is not let in between the steps of that work.
    """

    is_patient: bool = False


class Turn:
    """A lock that is given to threads in the order in which they asked for it.

    A thread that has the turn may enter again. Between the steps of long work it may give way to the waiting threads.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Waiter] = []
        self._owner: int | None = None
        self._depth = 0
        self._giving_way = 0  # how many threads wait between two steps of their work

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._wait(Waiter())
                self._owner = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()

    @contextmanager
    def after_work(self) -> Iterator[None]:
        """Have the turn while no work is in progress, not even between the steps of some work."""
        with self._changed:
            self._wait(Waiter(is_patient=True))
            self._owner, self._depth = threading.get_ident(), 1
        try:
            yield
        finally:
            self.__exit__()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    def give_way(self) -> None:
        """Let the waiting threads have the turn first, except patient ones. The calling thread must have the turn."""
        if not any(not waiter.is_patient for waiter in self._waiting):
            return
        with self._changed:
            owner, depth = self._owner, self._depth
            self._owner, self._depth = None, 0
            self._giving_way += 1
            self._changed.notify_all()
            self._wait(Waiter())
            self._giving_way -= 1
            self._owner, self._depth = owner, depth

    def _wait(self, waiter: Waiter) -> None:
        self._waiting.append(waiter)
        self._changed.wait_for(lambda: self._owner is None and self._next() is waiter)
        self._waiting.remove(waiter)

    def _next(self) -> Waiter:
        return next(waiter for waiter in self._waiting if not (waiter.is_patient and self._giving_way))
