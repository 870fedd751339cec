"""The queue: who goes next, and with whom. Knows keys, pixels, seconds and deadlines; no HTTP, no tensors, no clock.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996) between flows, a model's requests of about one size: while
several flows wait, each gets the same share of the device's time. A ticket is tagged with the queue's virtual time, or
with the end of the ticket before it of its flow if that is later; the lowest tag is next. So a picture waits for what
runs and for its like, not for the videos that were queued before it, and however many pictures come, a video gets its
share.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One request's place in the queue. Times are seconds of the caller's clock."""

    coder: Hashable  # what a device must hold to run it
    key: Hashable  # tickets of one key may be computed together
    pixels: int
    seconds: float  # what its work takes
    arrived: float
    deadline: float
    is_alone: bool = False  # it may have brought a worker down: nobody shall go down with it
    tag: float | None = None  # its place, from when it is first put

    @property
    def flow(self) -> Hashable:
        """A model's requests within a factor of four in pixels: so few that no choice of sizes is a choice of place."""
        return self.coder, self.pixels.bit_length() // 2


T = TypeVar("T", bound=Ticket)


class Queue(Generic[T]):
    """Tickets that wait, the next one first."""

    def __init__(self, batch_pixels: int, max_batch: int) -> None:
        """batch_pixels, max_batch: bounds of a batch; a ticket alone may be larger."""
        self.batch_pixels = batch_pixels
        self.max_batch = max_batch
        self._waiting: list[T] = []
        self._virtual_s = 0.0  # the tag of the ticket that was taken last
        self._ends: dict[Hashable, float] = {}  # of each flow's last ticket, in virtual time

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    def put(self, ticket: T) -> None:
        """Again with a ticket that was taken before, and it has the place that it had."""
        if ticket.tag is None:
            ticket.tag = max(self._virtual_s, self._ends.get(ticket.flow, 0.0))
            self._ends[ticket.flow] = ticket.tag + ticket.seconds
        bisect.insort(self._waiting, ticket, key=lambda waiting: (waiting.tag, waiting.arrived))

    def remove(self, ticket: T) -> None:
        """Forget the ticket, if it still waits; its flow is not charged for it."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            flow = [other for other in self._waiting if other.flow == ticket.flow]
            ends = [other.tag + other.seconds for other in flow if other.tag is not None]
            self._ends[ticket.flow] = max(ends, default=0.0)

    def expire(self, now: float) -> list[T]:
        """Take out those whose deadline has passed: they never start."""
        late = [ticket for ticket in self._waiting if ticket.deadline <= now]
        for ticket in late:
            self.remove(ticket)
        return late

    def take(self, can_run: Callable[[Any], bool], ahead_of_time_s: float | None = None) -> list[T]:
        """The next batch for a device that runs these models: the ticket of the lowest tag, and others of its key.

        ahead_of_time_s: for a device that is still at work. Nothing, unless the batch is full and takes no longer.
        """
        head = self._head(can_run)
        if head is None:
            return []
        batch, pixels = self._batch_of(head)
        has_room = len(batch) < self.max_batch and pixels + head.pixels <= self.batch_pixels and not head.is_alone
        if ahead_of_time_s is not None and (has_room or head.seconds * len(batch) > ahead_of_time_s):
            return []
        return self._taken(batch)

    def take_short(self, can_run: Callable[[Any], bool], longest_s: float, latest_tag: float) -> list[T]:
        """Return a batch to run between the steps of longer work, or nothing. Longer tickets keep their place.

        longest_s: bounds the batch's own seconds. latest_tag: the virtual time that the longer work has used up.
        Tickets with a later tag belong to a flow that has had as much of the device as the longer work: they wait.
        """
        for head in self._waiting:
            if (head.tag or 0.0) > latest_tag:
                break
            batch, _ = self._batch_of(head)
            if can_run(head.coder) and not head.is_alone and head.seconds * len(batch) <= longest_s:
                return self._taken(batch)
        return []

    def seconds_before(self, ticket: T, counts: Callable[[T], bool]) -> float:
        """Return the seconds of the tickets that come before this one, of those that count."""
        place = self._waiting.index(ticket)
        return sum(before.seconds for before in self._waiting[:place] if counts(before))

    def _head(self, can_run: Callable[[Any], bool]) -> T | None:
        return next((ticket for ticket in self._waiting if can_run(ticket.coder)), None)

    def _batch_of(self, head: T) -> tuple[list[T], int]:
        """The ticket with others of its key that fit one batch, and the pixels of all."""
        batch, pixels = [head], head.pixels
        for ticket in self._waiting:
            is_alike = ticket.key == head.key and ticket is not head and not (ticket.is_alone or head.is_alone)
            if is_alike and len(batch) < self.max_batch and pixels + ticket.pixels <= self.batch_pixels:
                batch.append(ticket)
                pixels += ticket.pixels
        return batch, pixels

    def _taken(self, batch: list[T]) -> list[T]:
        for ticket in batch:
            self._waiting.remove(ticket)
        first_left = self._waiting[0].tag if self._waiting else None
        reached = batch[0].tag or 0.0
        self._virtual_s = max(self._virtual_s, reached if first_left is None else min(reached, first_left))
        self._ends = {key: end for key, end in self._ends.items() if end > self._virtual_s}
        return batch
