"""The places and the bytes of admitted requests, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.errors import QueueFull
from server.scheduling.admission import Admission, Admissions
from tests.scheduling import virtual

Scene = Callable[[Admissions], Awaitable[Any]]


@pytest.fixture(autouse=True)
def check_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.scheduling.admission.CHECK_EVERY_BYTES", 1)


def admitting(scene: Scene, most_bytes: int = 100, places: int = 4) -> Any:
    async def play() -> Any:
        return await scene(Admissions(most_bytes, lambda: places, lambda what: QueueFull(what, 1)))

    return virtual.run(play())


def test_what_is_computed_bounds_what_comes_and_one_request_always_may() -> None:
    async def scene(admissions: Admissions) -> None:
        with admissions.admit("a", 300) as first, admissions.admit("b", 300) as second:
            first.reserve(1000)
            with pytest.raises(QueueFull):
                second.reserve(1)
        assert admissions.size_bytes == 0
        with admissions.admit("b", 300) as second:
            second.reserve(1000)

    admitting(scene)


def test_a_head_reserves_nothing() -> None:
    """One connection that sends only a head must not keep others out."""

    async def scene(admissions: Admissions) -> None:
        with admissions.admit("a", 300), admissions.admit("b", 300) as honest:
            admissions.check_room(90)
            admissions.check_room(90)
            honest.reserve(90)
            with pytest.raises(QueueFull):
                admissions.check_room(90)

    admitting(scene)


def test_the_slowest_body_is_given_up_when_memory_is_wanted() -> None:
    async def scene(admissions: Admissions) -> list[str]:
        given_up: list[str] = []
        with (
            admissions.admit("a", 300) as slow,
            admissions.admit("b", 300) as slower,
            admissions.admit("c", 300) as honest,
            slow.arriving(lambda: given_up.append("slow")),
            slower.arriving(lambda: given_up.append("slower")),
        ):
            slow.grow(40)
            slower.grow(30)
            await asyncio.sleep(5)
            honest.reserve(50)
            assert (given_up, slower.is_given_up, admissions.size_bytes) == (["slower"], True, 90)
            honest.reserve(80)
        return given_up

    assert admitting(scene) == ["slower", "slow"]


def test_a_body_that_began_just_now_is_not_given_up() -> None:
    async def scene(admissions: Admissions) -> None:
        with (
            admissions.admit("a", 300) as young,
            admissions.admit("b", 300) as other,
            young.arriving(lambda: pytest.fail("it was given up")),
        ):
            young.grow(40)
            with pytest.raises(QueueFull):
                other.reserve(70)

    admitting(scene)


def test_what_waits_for_one_peer_leaves_half_to_others() -> None:
    async def scene(admissions: Admissions) -> None:
        with admissions.admit("a", 300) as unread, admissions.admit("a", 300) as second:
            unread.reserve(60)
            unread.send(60)
            with pytest.raises(QueueFull, match="your address"):
                second.grow(1)
            with pytest.raises(QueueFull, match="your address"), admissions.admit("a", 300):
                pass
            with admissions.admit("b", 300) as other:
                other.grow(10)

    admitting(scene)


def test_an_answer_that_is_sent_holds_no_place() -> None:
    async def scene(admissions: Admissions) -> None:
        for _ in range(10):
            with admissions.place("a"):
                pass
        with admissions.place("a"):
            admissions.check_place("a")

    admitting(scene, places=2)


def test_a_peer_that_holds_all_places_leaves_some_to_others() -> None:
    async def scene(admissions: Admissions) -> None:
        with admissions.place("a"), admissions.place("a"), admissions.place("a"), admissions.place("a"):
            with pytest.raises(QueueFull, match="4 requests are already waiting or in progress"):
                admissions.check_place("a")
            with admissions.place("b"), pytest.raises(QueueFull):
                admissions.check_place("c")

    admitting(scene)


def test_bytes_that_a_thread_still_holds_stay_counted() -> None:
    async def scene(admissions: Admissions) -> None:
        thread: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        with admissions.admit("a", 300) as left:
            left.grow(50)
            admissions.keep_until(thread, left)
        assert admissions.size_bytes == 50
        thread.set_result(None)
        await asyncio.sleep(0)
        assert admissions.size_bytes == 0

    admitting(scene)


def test_a_body_that_is_late_already_is_given_up_without_harm() -> None:
    """The upload's timeout has fired, but its task has not run yet. That must not make another request fail."""

    async def scene(admissions: Admissions) -> int:
        async def upload(admission: Admission) -> None:
            async with asyncio.timeout(5) as deadline:

                def give_up() -> None:
                    if not deadline.expired():
                        deadline.reschedule(0)

                with admission.arriving(give_up):
                    admission.grow(60)
                    await asyncio.sleep(100)

        with admissions.admit("a", 300) as late, admissions.admit("b", 300) as other:
            uploading = asyncio.ensure_future(upload(late))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_at(5, other.reserve, 80)
            with pytest.raises(TimeoutError):
                await uploading
            return other.size_bytes

    assert admitting(scene) == 80
