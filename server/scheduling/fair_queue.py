"""The queue: which request goes next, and which others go with it in a batch.

Knows only keys, pixels, seconds and deadlines: no HTTP, no tensors, no clock.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996) between flows. A flow is the requests of one direction of
a model that have about the same size. While several flows wait, each gets the same share of the device's time. Every
waiting request (a ticket) has a tag: the virtual time of the queue when it is put, or the end of the previous ticket of
its flow if that is later. The virtual time is the tag up to which work has been handed out. The ticket with the lowest
tag is next. So an image waits at most for the running batch and for other images, but not for the videos that were
queued before it; and a video gets its share of the time, however many images arrive.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One request's place in the queue.

    coder: what a device must have loaded to run it.
    key: tickets with the same key may be computed in one batch.
    pixels: the size of its work.
    seconds: the estimated time of its work on a device.
    arrived, deadline: in seconds of the caller's clock.
    is_alone: it is computed in a batch of its own. True after a worker died while computing it, so that a second crash
        hits no other request.
    tag: its virtual time, which decides its place; None until it is first put into the queue.
    """

    coder: Hashable
    key: Hashable
    pixels: int
    seconds: float
    arrived: float
    deadline: float
    is_alone: bool = False
    tag: float | None = None

    @property
    def flow(self) -> Hashable:
        """The flow that it belongs to: its coder, and its size within a factor of four.

        The sizes are so coarse that a client cannot gain priority by sending many distinct sizes.
        """
        return self.coder, self.pixels.bit_length() // 2


T = TypeVar("T", bound=Ticket)


class Queue(Generic[T]):
    """The waiting tickets. Iterating yields them by their tags, the next one first."""

    def __init__(self, batch_pixels: int, max_batch: int) -> None:
        """Make an empty queue.

        batch_pixels: the most pixels in a batch of several tickets. A single ticket may have more.
        max_batch: the most tickets in a batch.
        """
        self.batch_pixels = batch_pixels
        self.max_batch = max_batch
        self._waiting: list[T] = []
        self._virtual_s = 0.0  # the virtual time, which follows the tags of the tickets that are taken
        self._ends: dict[Hashable, float] = {}  # the virtual time at which the last ticket of each flow ends

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    def put(self, ticket: T) -> None:
        """Add a ticket. A ticket that was taken and is put back keeps its original tag."""
        if ticket.tag is None:
            ticket.tag = max(self._virtual_s, self._ends.get(ticket.flow, 0.0))
            self._ends[ticket.flow] = ticket.tag + ticket.seconds
        bisect.insort(self._waiting, ticket, key=lambda waiting: (waiting.tag, waiting.arrived))

    def remove(self, ticket: T) -> None:
        """Remove a ticket, and do not charge its flow for it. Does nothing if the ticket does not wait."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            flow = [other for other in self._waiting if other.flow == ticket.flow]
            ends = [other.tag + other.seconds for other in flow if other.tag is not None]
            self._ends[ticket.flow] = max(ends, default=0.0)

    def expire(self, now: float) -> list[T]:
        """Remove and return the tickets whose deadline has passed. now: in seconds of the caller's clock."""
        late = [ticket for ticket in self._waiting if ticket.deadline <= now]
        for ticket in late:
            self.remove(ticket)
        return late

    def take(self, can_run: Callable[[Any], bool], ahead_of_time_s: float | None = None) -> list[T]:
        """Remove and return the next batch: the runnable ticket with the lowest tag, and others with the same key.

        can_run: returns whether the device can run a coder.
        ahead_of_time_s: for a device that is still busy. The batch is returned only if it is full and takes at most
            this long; otherwise the list is empty, and the tickets keep their places.
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
        """Remove and return a batch to run between the steps of longer work; an empty list if there is none.

        can_run: returns whether the device can run a coder between those steps.
        longest_s: the most seconds that the batch may take.
        latest_tag: the virtual time that the longer work has used up. Tickets with a later tag are not taken: their
            flow has already had as much of the device as the longer work.
        """
        for head in self._waiting:
            if (head.tag or 0.0) > latest_tag:
                break
            batch, _ = self._batch_of(head)
            if can_run(head.coder) and not head.is_alone and head.seconds * len(batch) <= longest_s:
                return self._taken(batch)
        return []

    def seconds_before(self, ticket: T, counts: Callable[[T], bool]) -> float:
        """Return the estimated seconds of the tickets before this one. counts: returns whether to count a ticket."""
        place = self._waiting.index(ticket)
        return sum(before.seconds for before in self._waiting[:place] if counts(before))

    def _head(self, can_run: Callable[[Any], bool]) -> T | None:
        return next((ticket for ticket in self._waiting if can_run(ticket.coder)), None)

    def _batch_of(self, head: T) -> tuple[list[T], int]:
        """Return the ticket with others of its key that fit into one batch, and the pixels of all of them."""
        batch, pixels = [head], head.pixels
        for ticket in self._waiting:
            is_alike = ticket.key == head.key and ticket is not head and not (ticket.is_alone or head.is_alone)
            if is_alike and len(batch) < self.max_batch and pixels + ticket.pixels <= self.batch_pixels:
                batch.append(ticket)
                pixels += ticket.pixels
        return batch, pixels

    def _taken(self, batch: list[T]) -> list[T]:
        """Remove the tickets of a batch, advance the virtual time, and return the batch."""
        for ticket in batch:
            self._waiting.remove(ticket)
        first_left = self._waiting[0].tag if self._waiting else None
        reached = batch[0].tag or 0.0
        self._virtual_s = max(self._virtual_s, reached if first_left is None else min(reached, first_left))
        self._ends = {key: end for key, end in self._ends.items() if end > self._virtual_s}
        return batch
