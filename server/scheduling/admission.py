"""The admitted requests and the memory that they hold. Knows no HTTP, no models and no devices.

A request's bytes are counted from the first one received until its memory is free again: while the body arrives, the
bytes received; once it is complete, the body and the largest possible answer; while the answer is sent, the answer.
A client can hold memory at no cost by sending its body slowly or by reading its answer slowly. So a request is refused
where such bytes of one peer's requests would exceed half of the limit together. To make room, the slowest upload is
aborted first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import QueueFull

PEER_SHARE = 0.5  # of the bytes, for what waits for one peer
CHECK_EVERY_BYTES = 64 << 10
SPARE_PLACES = 4  # one more place for so many, for peers that hold none
YOUNG_S = 1.0  # bodies that began so shortly ago are not given up


class Admission:
    """One request's share of the memory. Raises QueueFull where it would be too much.

    peer: the address that it came from.
    deadline: time on the event loop's clock by which the answer must be made.
    """

    def __init__(self, admissions: Admissions, peer: str, deadline: float) -> None:
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
        return self.size_bytes / max(0.001, asyncio.get_running_loop().time() - self.began)

    @contextmanager
    def arriving(self, give_up: Callable[[], None]) -> Iterator[None]:
        """While the body arrives. give_up: called when its memory is wanted by others; reading then ends."""
        self._give_up = give_up
        try:
            yield
        finally:
            self._give_up = None

    def grow(self, size_bytes: int) -> None:
        """Count bytes of the body that have arrived."""
        self.size_bytes += size_bytes
        self._unchecked += size_bytes
        if self._unchecked >= CHECK_EVERY_BYTES:  # each check looks at all requests: not for every byte of a trickle
            self._unchecked = 0
            self._admissions.check_share(self, self.size_bytes)
            self._admissions.make_room(self, self.size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Count the whole request and its answer instead, now that the body is here."""
        self._admissions.make_room(self, size_bytes)
        self.size_bytes, self.waits_for_client = size_bytes, False

    def send(self, size_bytes: int) -> None:
        """Count the answer instead, which waits to be read."""
        self.size_bytes, self.waits_for_client = size_bytes, True

    def end_arrival(self) -> None:
        """Give this body up. Only for one that `is_arriving`."""
        assert self._give_up is not None
        self.is_given_up = True
        self.size_bytes = 0
        self._give_up()

    @property
    def is_arriving(self) -> bool:
        return self._give_up is not None


class Admissions:
    """All requests that were let in, the places and the bytes that they hold."""

    def __init__(self, most_bytes: int, places: Callable[[], int], refuse: Callable[[str], QueueFull]) -> None:
        """most_bytes: bounds the memory of all requests. places: how many may wait or be computed at a time.

        refuse: makes the error of the sentence's first half, which says what is full.
        """
        self._most_bytes = most_bytes
        self._most_places = places
        self._refuse = refuse
        self._all: set[Admission] = set()
        self._leaving: set[Admission] = set()  # over, but a thread still holds their bytes
        self._places: list[str] = []  # the peers of those that wait or are computed

    @property
    def size_bytes(self) -> int:
        return sum(admission.size_bytes for admission in self._all | self._leaving)

    @contextmanager
    def admit(self, peer: str, deadline: float) -> Iterator[Admission]:
        """Admit a request. Raise QueueFull if its peer already holds more than its share of the bytes."""
        admission = Admission(self, peer, deadline)
        self.check_share(admission, 0)
        self._all.add(admission)
        try:
            yield admission
        finally:
            self._all.discard(admission)

    @contextmanager
    def place(self, peer: str) -> Iterator[None]:
        """Hold a place, from when the whole request is here until its answer is made. Raises QueueFull."""
        self.check_place(peer)
        self._places.append(peer)
        try:
            yield
        finally:
            self._places.remove(peer)

    def check_place(self, peer: str) -> None:
        """Raise QueueFull unless there is a place; a few more are kept for peers that hold none."""
        places = self._most_places()
        if self._places and peer not in self._places:
            places += -(-places // SPARE_PLACES)
        if len(self._places) >= places:
            raise self._refuse(f"{len(self._places)} requests wait already")

    def check_room(self, size_bytes: int) -> None:
        """Raise QueueFull if a request of this size would not fit beside those already received; reserve nothing."""
        held = sum(admission.size_bytes for admission in self._all if not admission.is_arriving)
        if held and held + size_bytes > self._most_bytes:
            raise self._full()

    def make_room(self, admission: Admission, size_bytes: int) -> None:
        """Raise QueueFull unless this request may hold so many bytes. A request without others beside it always may."""
        while self._held_beside(admission) and self._held_beside(admission) + size_bytes > self._most_bytes:
            if not self._give_up_slowest(self._all - {admission}):
                raise self._full()

    def keep_until(self, future: asyncio.Future[object], admission: Admission) -> None:
        """Count a request's bytes until a thread is done with them, even if the request ends before."""
        if future.done():
            return
        self._leaving.add(admission)
        future.add_done_callback(lambda _: self._leaving.discard(admission))

    def _held_beside(self, admission: Admission) -> int:
        return sum(other.size_bytes for other in self._all | self._leaving if other is not admission)

    def check_share(self, admission: Admission, size_bytes: int) -> None:
        """Raise QueueFull unless what waits for this peer leaves half of the bytes to others."""
        of_peer = {other for other in self._all if other.peer == admission.peer and other.waits_for_client}
        of_peer.discard(admission)
        while (
            held := sum(other.size_bytes for other in of_peer)
        ) and held + size_bytes > PEER_SHARE * self._most_bytes:
            if not self._give_up_slowest(of_peer):
                raise self._refuse("your address has too many uploads and unread answers open")

    def _give_up_slowest(self, admissions: set[Admission]) -> bool:
        """Give up the body that arrives most slowly, unless all began just now. Returns whether there was one."""
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
        return self._refuse("the accepted requests hold as many bytes as this server allows")
