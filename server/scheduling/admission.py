"""Admit requests, and count the memory that they hold. Knows no HTTP, no models and no devices.

A request's bytes are counted until its memory is free again: while the body arrives, the bytes received so far; once
it is complete, the body and the largest possible answer; while the answer is sent, the answer.

A client can hold memory at no cost by sending its body slowly or by reading its answer slowly. So the memory of
requests whose client (by its address, the peer) is still sending or reading may not exceed half of the limit for each
peer; a request that would exceed it is refused. To make
room for a request, the slowest uploads are aborted first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import QueueFull

PEER_SHARE = 0.5  # the most that requests of one peer may hold while it sends or reads, as a share of the limit
CHECK_EVERY_BYTES = 64 << 10
SPARE_PLACES = 4  # for every 4 places there is one more, only for peers that hold none
YOUNG_S = 1.0  # an upload is not aborted before it has lasted this long


class Admission:
    """One admitted request, and the memory that it holds.

    peer: the address of its client.
    deadline: when the answer must be ready, in seconds of the event loop's clock.
    began: when it was admitted, in seconds of the same clock.
    size_bytes: the memory that it holds now.
    waits_for_client: the client is still sending the body, or still reading the answer.
    is_given_up: its upload was aborted to make room for other requests.
    """

    def __init__(self, admissions: Admissions, peer: str, deadline: float) -> None:
        """Make the entry of a request that holds no memory yet. Only `Admissions.admit` calls this."""
        self.peer = peer
        self.deadline = deadline
        self.size_bytes = 0
        self.waits_for_client = True
        self.is_given_up = False
        self._unchecked = 0
        self.began = asyncio.get_running_loop().time()
        self._admissions = admissions
        self._give_up: Callable[[], None] | None = None

    @property
    def bytes_per_s(self) -> float:
        """The bytes that it holds, divided by the time since it was admitted."""
        return self.size_bytes / max(0.001, asyncio.get_running_loop().time() - self.began)

    @contextmanager
    def arriving(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Return a context manager to receive the body in.

        give_up: called to abort the upload, when other requests need its memory. It must make the reading end.
        """
        self._give_up = give_up
        try:
            yield
        finally:
            self._give_up = None

    def grow(self, size_bytes: int) -> None:
        """Count more bytes of the body, which have arrived. Raises QueueFull if they do not fit."""
        self.size_bytes += size_bytes
        self._unchecked += size_bytes
        if self._unchecked >= CHECK_EVERY_BYTES:  # a check looks at all requests, which is too much for every byte
            self._unchecked = 0
            self._admissions.check_share(self, self.size_bytes)
            self._admissions.make_room(self, self.size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Count the whole request and its largest possible answer, now that the body is complete.

        Raises QueueFull if they do not fit.
        """
        self._admissions.make_room(self, size_bytes)
        self.size_bytes, self.waits_for_client = size_bytes, False

    def send(self, size_bytes: int) -> None:
        """Count only the answer, while the client reads it."""
        self.size_bytes, self.waits_for_client = size_bytes, True

    def end_arrival(self) -> None:
        """Abort the upload of the body. May only be called while `is_arriving` is true."""
        assert self._give_up is not None
        self.is_given_up = True
        self.size_bytes = 0
        self._give_up()

    @property
    def is_arriving(self) -> bool:
        """Whether the body is being received."""
        return self._give_up is not None


class Admissions:
    """All admitted requests, and the places and bytes that they hold."""

    def __init__(self, most_bytes: int, places: Callable[[], int], refuse: Callable[[str], QueueFull]) -> None:
        """Set the limits.

        most_bytes: the memory that all requests together may hold.
        places: returns how many requests may wait or be computed at a time.
        refuse: makes the error from a clause that says what is full.
        """
        self._most_bytes = most_bytes
        self._most_places = places
        self._refuse = refuse
        self._all: set[Admission] = set()
        self._leaving: set[Admission] = set()  # requests that have ended, but whose bytes a thread still holds
        self._places: list[str] = []  # the peers of the requests that wait or are computed

    @property
    def size_bytes(self) -> int:
        """The memory that all requests hold."""
        return sum(admission.size_bytes for admission in self._all | self._leaving)

    @contextmanager
    def admit(self, peer: str, deadline: float) -> Iterator[Admission]:
        """Admit a request until the context ends.

        Raises QueueFull if the requests that this peer is sending or reading already hold more than its share.
        """
        admission = Admission(self, peer, deadline)
        self.check_share(admission, 0)
        self._all.add(admission)
        try:
            yield admission
        finally:
            self._all.discard(admission)

    @contextmanager
    def place(self, peer: str) -> Iterator[None]:
        """Hold one of the places in a context, which lasts from the complete request until its answer is ready.

        Raises QueueFull if there is no place for this peer.
        """
        self.check_place(peer)
        self._places.append(peer)
        try:
            yield
        finally:
            self._places.remove(peer)

    def check_place(self, peer: str) -> None:
        """Raise QueueFull if there is no place for this peer.

        A quarter more places are kept for peers that hold none.
        """
        places = self._most_places()
        if self._places and peer not in self._places:
            places += -(-places // SPARE_PLACES)
        if len(self._places) >= places:
            raise self._refuse(f"{len(self._places)} requests are already waiting or in progress")

    def check_room(self, size_bytes: int) -> None:
        """Raise QueueFull if a request of this size would not fit in addition to those that are complete.

        Reserves no memory.
        """
        held = sum(admission.size_bytes for admission in self._all if not admission.is_arriving)
        if held and held + size_bytes > self._most_bytes:
            raise self._full()

    def make_room(self, admission: Admission, size_bytes: int) -> None:
        """Make room for a request to hold this many bytes in total, by aborting the slowest uploads of other requests.

        Raises QueueFull if that does not make enough room. A request that is the only one always fits.
        """
        while self._held_beside(admission) and self._held_beside(admission) + size_bytes > self._most_bytes:
            if not self._give_up_slowest(self._all - {admission}):
                raise self._full()

    def keep_until(self, future: asyncio.Future[object], admission: Admission) -> None:
        """Count a request's bytes until `future` is done, because its thread uses them even if the request ends."""
        if future.done():
            return
        self._leaving.add(admission)
        future.add_done_callback(lambda _: self._leaving.discard(admission))

    def _held_beside(self, admission: Admission) -> int:
        return sum(other.size_bytes for other in self._all | self._leaving if other is not admission)

    def check_share(self, admission: Admission, size_bytes: int) -> None:
        """Raise QueueFull if this many more bytes would exceed what this peer's unfinished transfers may hold.

        Aborts the slowest uploads of the same peer first.
        """
        of_peer = {other for other in self._all if other.peer == admission.peer and other.waits_for_client}
        of_peer.discard(admission)
        while (
            held := sum(other.size_bytes for other in of_peer)
        ) and held + size_bytes > PEER_SHARE * self._most_bytes:
            if not self._give_up_slowest(of_peer):
                raise self._refuse("your address has too many uploads and unread answers open")

    def _give_up_slowest(self, admissions: set[Admission]) -> bool:
        """Abort the slowest upload of these requests that has lasted for YOUNG_S. Return whether there was one."""
        now = asyncio.get_running_loop().time()
        slow = [
            other for other in admissions if other.is_arriving and not other.is_given_up and now - other.began > YOUNG_S
        ]
        if not slow:
            return False
        victim = min(slow, key=lambda other: other.bytes_per_s)
        victim.end_arrival()
        return True

    def _full(self) -> QueueFull:
        return self._refuse("the accepted requests already hold as many bytes as this server allows")
