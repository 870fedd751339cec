"""Receive the body of a request within its limits of time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from ..config import SLOWEST_BYTES_PER_S, ServerOptions
from ..errors import QueueFull, RequestTooSlow, TooLarge
from ..scheduling.admission import Admission
from ..scheduling.service import Service

T = TypeVar("T")


class Threads:
    """Threads for work on the bodies of requests.

    Work that waits for a thread is not begun if its client leaves. Work that has begun cannot be stopped, so the bytes
    of its request stay counted until it ends.
    """

    def __init__(self, count: int, name: str) -> None:
        """Make `count` threads, whose names begin with `name`."""
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free = asyncio.Semaphore(count)

    async def run(self, service: Service, admission: Admission, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` with its arguments on one of the threads, for an admitted request, and return its result."""
        await self._free.acquire()
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        future.add_done_callback(lambda _: self._free.release())
        service.keep_until(future, admission)
        return await asyncio.shield(future)


class BodyThreads:
    """Threads for each kind of body, so that cheap work never waits for expensive work."""

    def __init__(self) -> None:
        """Make the threads: 2 for JSON, 2 for image files, 1 for video files, 1 that joins videos and their sounds."""
        self.json = Threads(2, "json")
        self.images = Threads(2, "images")
        self.videos = Threads(1, "videos")
        self.joins = Threads(1, "joins")


def declared_length(request: Request) -> int | None:
    """Return the Content-Length; None if there is none."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def check_declared(length: int | None, limit: int) -> None:
    """Raise TooLarge if a declared length exceeds the limit of a body."""
    if length and length > limit:
        raise _too_large(limit)


async def receive_whole(request: Request, admission: Admission, options: ServerOptions) -> bytearray:
    """Receive a body of unknown size, of at most `max_body_mb`. Raises TooLarge, RequestTooSlow, QueueFull."""
    limit = options.max_body_mb << 20
    body = await receive(request, admission, limit, options.body_timeout_s)
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def receive(request: Request, admission: Admission, limit: int, grace_s: float) -> bytearray:
    """Receive a body, and stop after the chunk that exceeds `limit` bytes.

    grace_s: the time for a body, in seconds, in addition to one second per 64 KiB received.

    Raises RequestTooSlow when that time is over, so that a slow trickle cannot hold the connection open. Raises
    QueueFull when faster clients need the memory.
    """
    body, started = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started + grace_s) as deadline:

            def give_up() -> None:
                if not deadline.expired():
                    deadline.reschedule(0)

            with admission.arriving(give_up):
                async for chunk in request.stream():
                    admission.grow(len(chunk))
                    body += chunk
                    if len(body) > limit:
                        break
                    if not admission.is_given_up:
                        deadline.reschedule(started + grace_s + len(body) / SLOWEST_BYTES_PER_S)
    except TimeoutError:
        if admission.is_given_up:
            raise QueueFull(
                "this upload was aborted because it was slow and other requests need its memory; "
                "try again, and send the body faster",
                5,
            ) from None
        raise RequestTooSlow(
            f"only {len(body)} bytes of the body arrived in time; send at least 64 KiB per second"
        ) from None
    return body


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes that this server accepts; send less data")
