"""The service with a fake engine on a virtual clock: readiness, estimates, Retry-After, failed models, drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.errors import DeadlinePassed, ModelUnavailable, QueueFull, Unavailable
from server.metrics import Metrics
from server.model_info import CoderId, Direction
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.service import Service, State
from server.values import Rendered, Result
from tests.scheduling import virtual
from tests.scheduling.fake_engine import FakeEngine, request, settings_for

Scene = Callable[[Service, FakeEngine], Awaitable[Any]]


def serving(scene: Scene, *models: str, **flags: object) -> Any:
    async def play() -> Any:
        settings = settings_for(*(models or ("sd",)), **flags)
        engine = FakeEngine(*settings.models)
        service = Service(settings, Dispatcher([engine], settings.options), Metrics())
        await service.start()
        try:
            return await scene(service, engine)
        finally:
            await service.close()

    return virtual.run(play())


async def answer(
    service: Service, model: str = "sd", patience_s: float | None = None, side: int = 1024
) -> Result[Rendered]:
    with service.admitted("a", patience_s) as admission:
        async with service.in_time(admission):
            with service.place(admission):
                return await service.answer(request(model, side), admission)


async def refused(work: Awaitable[Any], kind: type[Exception]) -> Any:
    with pytest.raises(kind) as raised:
        await work
    return raised.value


def test_it_is_ready_once_started() -> None:
    async def scene(service: Service, engine: FakeEngine) -> None:
        service.check_can_serve()

    serving(scene)


def test_one_failed_model_leaves_the_server_ready_and_says_so() -> None:
    """The failed model is the default one. An orchestrator must not end the server, because it serves other models."""

    async def scene(service: Service, engine: FakeEngine) -> None:
        engine.held.clear()
        engine.fails[CoderId("sd")] = ModelUnavailable("sd", "damaged")
        await refused(answer(service), ModelUnavailable)
        service.check_can_serve()
        assert service.failed_models() == ["sd"]
        assert service.model_state("sd") == "failed"
        await answer(service, "flux")
        engine.held.clear()
        engine.fails[CoderId("flux")] = ModelUnavailable("flux", "damaged")
        await refused(answer(service, "flux"), ModelUnavailable)
        with pytest.raises(Unavailable, match="every model of this server failed to load"):
            service.check_can_serve()
        await asyncio.sleep(61)
        service.check_can_serve()

    serving(scene, "sd", "flux")


def test_a_failed_model_is_refused_before_its_body_and_takes_no_place() -> None:
    async def scene(service: Service, engine: FakeEngine) -> None:
        engine.held.clear()
        engine.fails[CoderId("bad")] = ModelUnavailable("bad", "damaged")
        await refused(answer(service, "bad"), ModelUnavailable)
        await asyncio.sleep(20)
        with pytest.raises(ModelUnavailable) as told:
            service.check_loads("bad", Direction.DECODE)
        assert told.value.retry_after_s == 40
        service.check_loads("bad", Direction.ENCODE)
        errors = await asyncio.gather(*(answer(service, "bad") for _ in range(16)), return_exceptions=True)
        assert {type(error) for error in errors} == {ModelUnavailable}
        await answer(service, "sd")

    serving(scene, "sd", "bad", max_queue=2)


def test_retry_after_is_the_work_that_comes_first() -> None:
    async def scene(service: Service, engine: FakeEngine) -> int | None:
        engine.takes = lambda batch: 30.0 * len(batch.members)
        await answer(service)  # the service learns that a mebipixel takes 30 s
        waiting = [asyncio.ensure_future(answer(service)) for _ in range(2)]
        await asyncio.sleep(0)
        error = await refused(answer(service), QueueFull)
        for each in waiting:
            each.cancel()
        return error.retry_after_s

    assert serving(scene, max_queue=2, batch_pixels=1) == 60


def test_what_cannot_be_done_in_time_is_refused_at_once_once_that_is_known() -> None:
    async def scene(service: Service, engine: FakeEngine) -> None:
        engine.takes = lambda batch: 30.0
        for _ in range(2):  # a single measurement may include compilation
            await refused(answer(service, patience_s=20), DeadlinePassed)
            await asyncio.sleep(100)
        for _ in range(2):
            await answer(service)
        started = asyncio.get_running_loop().time()
        error = await refused(answer(service, patience_s=20), DeadlinePassed)
        assert asyncio.get_running_loop().time() == started
        assert "takes about 30 s" in str(error)
        await answer(service, patience_s=40)
        await asyncio.sleep(200)  # old measurements do not refuse requests
        engine.takes = lambda batch: 1.0
        await answer(service, patience_s=20)

    serving(scene)


def test_the_deadline_covers_the_work() -> None:
    async def scene(service: Service, engine: FakeEngine) -> float:
        engine.takes = lambda batch: 1000.0
        started = asyncio.get_running_loop().time()
        await refused(answer(service, patience_s=7), DeadlinePassed)
        return asyncio.get_running_loop().time() - started

    assert serving(scene) == pytest.approx(7)


def test_a_drain_waits_for_answers_that_are_sent() -> None:
    async def scene(service: Service, engine: FakeEngine) -> float:
        async def send() -> None:
            with service.answering():
                await asyncio.sleep(5)

        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0)
        started = asyncio.get_running_loop().time()
        await service.drain()
        await sending
        with pytest.raises(Unavailable, match="shutting down"), service.admitted("a"):
            pass
        assert service.state is State.DRAINING
        return asyncio.get_running_loop().time() - started

    assert serving(scene) == pytest.approx(5)


def test_a_drain_ends_when_its_time_is_over() -> None:
    async def scene(service: Service, engine: FakeEngine) -> float:
        with service.answering():
            started = asyncio.get_running_loop().time()
            await service.drain()
            return asyncio.get_running_loop().time() - started

    assert serving(scene, drain_timeout_s=12) == pytest.approx(12)


def test_many_small_requests_do_not_say_how_long_a_large_one_takes() -> None:
    async def scene(service: Service, engine: FakeEngine) -> None:
        engine.takes = lambda batch: 0.03
        for _ in range(8):
            await answer(service, side=64)
        await answer(service, patience_s=100, side=16384)

    serving(scene)


def test_the_first_run_does_not_spoil_the_estimates() -> None:
    async def scene(service: Service, engine: FakeEngine) -> float:
        engine.takes = lambda batch: 30.0
        await answer(service)
        engine.takes = lambda batch: 0.1
        await answer(service)
        return service._estimates.seconds(CoderId("sd"), 1024 * 1024)

    assert serving(scene) == pytest.approx(0.1)


def test_all_who_ask_for_a_description_at_a_time_share_one_answer() -> None:
    """If the Hub cannot be reached, one attempt takes half a minute; one after another they would take hours."""

    async def scene(service: Service, engine: FakeEngine) -> tuple[int, float, set[type]]:
        asked = 0

        async def slow(model: str, *, is_local_only: bool = False) -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(23)
            raise ModelUnavailable(model, "the hub cannot be reached")

        service.infos.clear()
        engine.describe = slow
        leaving = asyncio.ensure_future(service.describe("hub"))
        waiting = [asyncio.ensure_future(service.describe("hub")) for _ in range(63)]
        await asyncio.sleep(1)
        leaving.cancel()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(ModelUnavailable):
            await service.describe("hub")
        return asked, asyncio.get_running_loop().time(), {type(error) for error in errors}

    assert serving(scene, "sd", "hub") == (1, 23, {ModelUnavailable})
