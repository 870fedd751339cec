"""The dispatcher with a fake engine on a virtual clock: batches, loads, retries, hangs, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.config import ServerOptions
from server.errors import DeadlinePassed, ModelUnavailable, WorkerCrashed
from server.model_info import CoderId, Direction
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.engines import Batch, Pending
from server.values import Rendered, Result
from tests.scheduling import virtual
from tests.scheduling.fake_engine import FakeEngine, pending


def dispatching(
    scene: Callable[[Dispatcher, FakeEngine], Awaitable[Any]], *held: str, engines: int = 1, **flags: object
) -> Any:
    """Run a scene on a virtual clock, with a dispatcher and its first engine, and return its result."""

    async def play() -> Any:
        made = [FakeEngine(*held) for _ in range(engines)]
        dispatcher = Dispatcher(made, ServerOptions(**flags))
        await dispatcher.start()
        try:
            return await scene(dispatcher, made[0])
        finally:
            await dispatcher.close()

    return virtual.run(play())


def now() -> float:
    return asyncio.get_running_loop().time()


def asked(dispatcher: Dispatcher, *members: Pending) -> list[asyncio.Task[Result[Rendered]]]:
    return [asyncio.ensure_future(dispatcher.answer(one)) for one in members]


async def failed(work: Awaitable[Any], kind: type[Exception]) -> Any:
    with pytest.raises(kind) as raised:
        await work
    return raised.value


def sizes(engine: FakeEngine) -> list[int]:
    return [len(batch.members) for batch in engine.batches]


# Batches.


def test_jobs_alike_go_together_while_the_device_is_at_work() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[int]:
        await asyncio.gather(*asked(dispatcher, *(pending() for _ in range(6))))
        return sizes(engine)

    assert dispatching(scene, "sd") == [1, 5]


def test_a_full_short_batch_is_staged_while_the_device_is_at_work() -> None:
    """Otherwise the device would wait for bytes between two batches."""

    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[list[int], list[bool]]:
        answers = asked(dispatcher, *(pending(seconds=0.01) for _ in range(7)))
        await asyncio.sleep(0.001)
        before = sizes(engine), [batch.started.done() for batch in engine.batches]
        await asyncio.gather(*answers)
        return before

    assert dispatching(scene, "sd", max_batch=2) == ([1, 2], [True, False])


def test_work_goes_to_the_engine_that_has_least() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[list[int], float]:
        await asyncio.gather(*asked(dispatcher, *(pending(seconds=1, side=1024) for _ in range(4))))
        return [len(made.batches) for made in dispatcher.engines], now()

    assert dispatching(scene, "sd", engines=2) == ([2, 2], pytest.approx(2))


# Short work beside long work.


def test_short_work_runs_between_the_steps_of_long_work() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[float]:
        long = asked(dispatcher, pending("video", side=4096, seconds=60))
        await asyncio.sleep(10)
        started = now()
        waits = []
        for _ in range(5):
            await dispatcher.answer(pending("sd", seconds=0.2))
            waits.append(now() - started)
            started = now()
        await asyncio.gather(*long)
        return waits

    assert max(dispatching(scene, "video", "sd")) < 1


def test_short_work_runs_although_other_long_work_waits() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> float:
        long = asked(dispatcher, pending("video", side=4096, seconds=60))
        await asyncio.sleep(1)
        long += asked(dispatcher, pending("film", side=4096, seconds=60), pending("video", side=2048, seconds=30))
        await asyncio.sleep(0)
        started = now()
        await dispatcher.answer(pending("sd", seconds=0.2))
        waited = now() - started
        await asyncio.gather(*long)
        return waited

    assert dispatching(scene, "video", "film", "sd") < 1


def test_work_that_cannot_run_beside_its_like_leaves_the_place_to_others() -> None:
    """diffusers' own coders keep state between their steps."""

    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[float, bool]:
        engine.coder = "streaming"
        long = asked(dispatcher, pending("video", side=4096, seconds=60))
        await asyncio.sleep(1)
        alike = asked(dispatcher, pending("video", side=64, seconds=0.1))
        started = now()
        await dispatcher.answer(pending("sd", seconds=0.2))
        found = now() - started, alike[0].done()
        await asyncio.gather(*long, *alike)
        return found

    waited, is_alike_done = dispatching(scene, "video", "sd")
    assert waited < 1
    assert not is_alike_done


def test_short_work_gets_no_more_than_its_share_beside_long_work() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> float:
        """Return the seconds of short work that is done when the long work is."""
        engine.takes = lambda batch: batch.seconds if batch.is_short else batch.seconds * 2  # half the time for others
        long = asked(dispatcher, pending("video", side=4096, seconds=20))
        await asyncio.sleep(0)
        shorts = asked(dispatcher, *(pending("sd", seconds=0.5, side=1024) for _ in range(200)))
        await asyncio.gather(*long)
        done = sum(short.done() for short in shorts)
        for short in shorts:
            short.cancel()
        return 0.5 * done

    assert dispatching(scene, "video", "sd", batch_pixels=1) == pytest.approx(20, abs=5)


def test_work_that_is_not_short_beside_the_long_one_waits_for_its_end() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[bool]:
        answers = asked(dispatcher, pending("video", side=4096, seconds=10), pending("sd", side=2048, seconds=8))
        await asyncio.gather(*answers)
        return [batch.is_short for batch in engine.batches]

    assert dispatching(scene, "video", "sd") == [False, False]


# Loads.


def test_every_request_to_a_model_that_does_not_load_is_refused_at_once() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[tuple[float, int | None, int]]:
        engine.fails[CoderId("bad")] = ModelUnavailable("bad", "damaged", retry_after_s=60)
        told = []
        for _ in range(3):
            started = now()
            error = await failed(dispatcher.answer(pending("bad")), ModelUnavailable)
            told.append((now() - started, error.retry_after_s, engine.loads[CoderId("bad")]))
            await asyncio.sleep(10)
        assert dispatcher.waiting == 0
        return told

    assert dispatching(scene, "sd") == [(0, 60, 1), (0, 50, 1), (0, 40, 1)]


def test_after_its_time_a_failed_load_is_tried_again() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> bool:
        engine.fails[CoderId("bad")] = ModelUnavailable("bad", "damaged", retry_after_s=60)
        await failed(dispatcher.answer(pending("bad")), ModelUnavailable)
        del engine.fails[CoderId("bad")]
        await asyncio.sleep(61)
        await dispatcher.answer(pending("bad"))
        return True

    assert dispatching(scene, "sd")


def test_all_who_wait_for_a_load_that_fails_are_told() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> int:
        engine.load_s = 5
        engine.fails[CoderId("bad")] = ModelUnavailable("bad", "damaged", retry_after_s=60)
        answers = await asyncio.gather(*asked(dispatcher, *(pending("bad") for _ in range(16))), return_exceptions=True)
        assert {type(answer) for answer in answers} == {ModelUnavailable}
        assert now() == 5
        return engine.loads[CoderId("bad")]

    assert dispatching(scene, "sd") == 1


def test_one_direction_that_does_not_load_leaves_the_other() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> None:
        engine.fails[CoderId("sd", Direction.ENCODE)] = ModelUnavailable("sd", "no encoder")
        await failed(dispatcher.answer(pending(direction=Direction.ENCODE)), ModelUnavailable)
        await dispatcher.answer(pending())

    dispatching(scene)


def test_a_device_that_cannot_load_a_model_leaves_it_to_another() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[int]:
        engine.fails[CoderId("sd")] = ModelUnavailable("sd", "no memory")
        await asyncio.gather(*asked(dispatcher, *(pending(side=2048, seconds=1) for _ in range(3))))
        return [made.loads[CoderId("sd")] for made in dispatcher.engines]

    assert dispatching(scene, engines=2) == [1, 1]


def test_a_load_never_blocks_the_device() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> float:
        engine.load_s = 100
        slow = asked(dispatcher, pending("big"))
        await asyncio.sleep(1)
        await dispatcher.answer(pending())
        done = now()
        await asyncio.gather(*slow)
        return done

    assert dispatching(scene, "sd") < 2


def test_a_description_that_fails_is_a_failed_load_of_both_directions() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[bool]:
        engine.fails[CoderId("bad")] = ModelUnavailable("bad", "no such folder")
        await failed(dispatcher.describe("bad"), ModelUnavailable)
        return [dispatcher.load_failure(CoderId("bad", direction)) is not None for direction in Direction]

    assert dispatching(scene, "sd") == [True, True]


# Workers that end.


def test_what_a_dead_worker_had_not_started_is_done_by_the_next() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[int, list[int]]:
        answers = asked(dispatcher, *(pending(seconds=1) for _ in range(4)))
        await asyncio.sleep(0.5)
        engine.die()
        await asyncio.sleep(3)
        engine.come_back()
        await asyncio.gather(*answers)
        return len(answers), sizes(engine)

    assert dispatching(scene, "sd") == (4, [1, 1, 3])


def test_a_job_that_was_running_twice_as_its_worker_died_is_to_blame() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[int, list[bool]]:
        poison = asked(dispatcher, pending(seconds=1))
        await asyncio.sleep(0)
        others = asked(dispatcher, pending(seconds=0.1), pending(seconds=0.1))
        for _ in range(2):
            await asyncio.sleep(0.5)
            engine.die()
            engine.come_back()
        await failed(poison[0], WorkerCrashed)
        await asyncio.gather(*others)
        return len(engine.batches), [batch.members[0].is_alone for batch in engine.batches[:2]]

    assert dispatching(scene, "sd")[1] == [True, True]


def test_work_without_progress_is_ended_and_slow_work_is_not() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[str]:
        await dispatcher.answer(pending(seconds=1000, within_s=5000))
        assert engine.killed == []
        engine.hangs = True
        waiting = asked(dispatcher, pending(seconds=1))
        await asyncio.sleep(0)
        await dispatcher.answer(pending(side=512, seconds=1))
        await asyncio.gather(*waiting)
        return engine.killed

    killed = dispatching(scene, "sd", hang_timeout_s=150)
    assert len(killed) == 1
    assert "no progress for 150 s" in killed[0]


# Deadlines, and clients that leave.


def test_a_job_whose_deadline_passes_in_the_queue_never_starts() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> int:
        running = asked(dispatcher, pending(seconds=0.9))
        await asyncio.sleep(0)
        late = asked(dispatcher, pending(side=512, seconds=0.1, within_s=0.5))
        await asyncio.gather(*running)
        await failed(late[0], DeadlinePassed)
        return len(engine.batches)

    assert dispatching(scene, "sd") == 1


def test_work_that_cannot_be_done_in_time_is_refused_at_once_with_the_estimate() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[str, float, int]:
        error = await failed(dispatcher.answer(pending(seconds=20, least_seconds=18, within_s=10)), DeadlinePassed)
        return str(error), now(), len(engine.batches) + dispatcher.waiting

    sentence, when, begun = dispatching(scene, "sd")
    assert "takes about 18 s, but its deadline is in 10 s" in sentence
    assert (when, begun) == (0, 0)


def test_what_comes_first_counts_in_the_estimate() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[str, int | None]:
        first = asked(dispatcher, *(pending(side=2048, seconds=8) for _ in range(3)))
        await asyncio.sleep(0)
        late = pending(side=2048, seconds=2, least_seconds=2, within_s=10)
        error = await failed(dispatcher.answer(late), DeadlinePassed)
        for answer in first:
            answer.cancel()
        return str(error), error.retry_after_s

    sentence, retry_after_s = dispatching(scene, "sd")
    assert "waits about 24 s for others" in sentence
    assert retry_after_s == 24


def test_a_long_batch_between_whose_steps_it_runs_does_not_count() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> float:
        long = asked(dispatcher, pending("video", side=4096, seconds=60), pending("film", side=4096, seconds=60))
        await asyncio.sleep(1)
        await dispatcher.answer(pending("sd", seconds=0.2, least_seconds=0.2, within_s=10))
        done = now()
        for answer in long:
            answer.cancel()
        return done

    assert dispatching(scene, "video", "film", "sd") < 2


def test_a_guess_refuses_nothing() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> None:
        engine.takes = lambda batch: 0.1
        await dispatcher.answer(pending(seconds=20, least_seconds=0, within_s=10))

    dispatching(scene, "sd")


def test_a_client_that_leaves_the_queue_is_forgotten() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> int:
        running, leaving = asked(dispatcher, pending(seconds=1), pending(side=512, seconds=1))
        await asyncio.sleep(0.5)
        leaving.cancel()
        await running
        await asyncio.sleep(5)
        return len(engine.batches) + dispatcher.waiting

    assert dispatching(scene, "sd") == 1


# What is told.


def test_the_wait_that_is_told_is_what_runs_and_what_waits_shared_by_the_engines() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> list[float]:
        assert dispatcher.seconds_ahead == 0
        answers = asked(dispatcher, *(pending(side=2048, seconds=8) for _ in range(4)))
        await asyncio.sleep(0)
        told = [dispatcher.seconds_ahead]
        await asyncio.sleep(4)
        told.append(dispatcher.seconds_ahead)
        for answer in answers:
            answer.cancel()
        return told

    assert dispatching(scene, "sd") == [32, 28]
    assert dispatching(scene, "sd", engines=2) == [16, 12]


def test_waiting_and_running_are_counted() -> None:
    async def scene(dispatcher: Dispatcher, engine: FakeEngine) -> tuple[int, int]:
        answers = asked(dispatcher, *(pending(side=2048, seconds=8) for _ in range(4)))
        await asyncio.sleep(1)
        found = dispatcher.running, dispatcher.waiting
        for answer in answers:
            answer.cancel()
        return found

    assert dispatching(scene, "sd") == (1, 3)


def test_an_engine_that_fails_answers_everybody() -> None:
    class Broken(FakeEngine):
        async def run(self, batch: Batch) -> None:
            raise ZeroDivisionError

    async def play() -> None:
        dispatcher = Dispatcher([Broken("sd")], ServerOptions())
        await dispatcher.start()
        await failed(dispatcher.answer(pending()), ZeroDivisionError)

    virtual.run(play())
