"""A cluster's replicas as Devices: Ray queues, routes and scales; what a replica's death interrupts is asked again."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from server.errors import Broken, ConfigError, ModelUnavailable, QueueFull, ServerError, WorkerCrashed
from server.model_info import CoderId, Direction, LoadedInfo, ModelInfo
from server.scheduling.dispatcher import MAX_DEATHS, MAX_TRIES
from server.scheduling.engines import Pending
from server.scheduling.load_failures import LoadFailures
from server.values import RenderedResult, Request
from server.workers.messages import Failure

log = logging.getLogger(__name__)

LOST = (RayActorError, ReplicaUnavailableError, OutOfMemoryError, NodeDiedError, ObjectLostError)
PAUSE_S = 1.0
LOOK_EVERY_S = 2.0


class Ask(msgspec.Struct, frozen=True):
    """A request on its way to a replica. patience_s: until its deadline, for clocks differ."""

    request: Request
    seconds: float
    patience_s: float
    is_alone: bool
    least_seconds: float = 0.0

    @staticmethod
    def of(pending: Pending) -> Ask:
        patience_s = pending.deadline - asyncio.get_running_loop().time()
        return Ask(pending.request, pending.seconds, patience_s, pending.is_alone, pending.least_seconds)

    def pending(self) -> Pending:
        deadline = asyncio.get_running_loop().time() + self.patience_s
        return Pending.of(
            self.request,
            seconds=self.seconds,
            least_seconds=self.least_seconds,
            deadline=deadline,
            is_alone=self.is_alone,
        )


class Reply(msgspec.Struct, frozen=True):
    """A replica's: what it holds, and one of the other three, or none of them when it begins with the request."""

    replica: str
    held: dict[str, LoadedInfo]
    result: RenderedResult | None = None
    info: ModelInfo | None = None
    failure: Failure | None = None


def id_of(coder: CoderId) -> str:
    """The name that Ray's multiplexing knows coder a model by."""
    return f"{coder.model}/{coder.direction}"


def coder_of(model_id: str) -> CoderId:
    model, _, direction = model_id.partition("/")
    return CoderId(model, Direction(direction))


class RayDevices:
    """The replicas of one deployment. There is no queue here: every pending goes to Ray's router at once."""

    is_alive = True  # a pending waits while Ray brings a replica back, or starts the first one

    def __init__(self, replicas: DeploymentHandle[Any], models: Sequence[str]) -> None:
        self.count = 1
        self._replicas = replicas
        self._models = models
        self._here: list[Reply] = []  # of each model, when this started
        self._jobs: set[Pending] = set()
        self._failures = LoadFailures(lambda: asyncio.get_running_loop().time())
        self._held: OrderedDict[str, dict[str, LoadedInfo]] = OrderedDict()  # by replica, the last to tell at the end
        self._counting: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._jobs) - self.running

    @property
    def running(self) -> int:
        return sum(pending.started is not None for pending in self._jobs)

    @property
    def seconds_ahead(self) -> float:
        return sum(pending.seconds for pending in self._jobs) / self.count

    async def start(self) -> None:
        """Once there is a replica, or none is wanted."""
        while True:
            if not await self._is_starting():
                break
            await asyncio.sleep(LOOK_EVERY_S)
        self._counting = asyncio.create_task(self._keep_counting())

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        if not is_local_only:
            reply = (await self._described([model], is_local_only=False))[0]
            try:
                return info_of(reply)
            except ServerError as error:
                raise self._noted(error, [CoderId(model, direction) for direction in Direction]) from None
        if not self._here:  # all at once: a replica's places are for decodes
            self._here = await self._described(self._models, is_local_only=True)
        return info_of(self._here[self._models.index(model)])

    async def load(self, model: str) -> None:
        """Each replica loads what must be there before Ray counts it among them."""

    def loaded(self, model: str) -> list[LoadedInfo]:
        return [held[model] for held in self._held.values() if model in held]

    def load_failure(self, coder: CoderId) -> ModelUnavailable | None:
        """One replica may lack the memory or the network that another one has, so a failure ends where one holds it."""
        if any(info.runs(coder.direction) for info in self.loaded(coder.model)):
            return None
        return self._failures.find([self], coder)

    async def answer(self, pending: Pending) -> RenderedResult:
        if failure := self.load_failure(pending.coder):
            raise failure
        self._jobs.add(pending)
        try:
            while True:
                try:
                    return await self._ask(pending)
                except LOST as error:
                    log.warning("a replica ended with a request in hand: %s", type(error).__name__)
                    self._count_death(pending)
                except BackPressureError as error:
                    if not pending.tries:
                        raise self._queue_full(error) from None
                    await asyncio.sleep(PAUSE_S)  # it was let in once
        finally:
            self._jobs.discard(pending)

    async def close(self) -> None:
        if self._counting:
            self._counting.cancel()

    async def _ask(self, pending: Pending) -> RenderedResult:
        replicas = self._replicas.options(method_name="run", stream=True, multiplexed_model_id=id_of(pending.coder))
        async for reply in self._replies(replicas, msgspec.msgpack.encode(Ask.of(pending))):
            last = reply
            if not (reply.result or reply.failure):
                pending.note_started()
        if last.failure:
            raise self._noted(last.failure.error(), [pending.coder])
        assert last.result
        return last.result

    def _noted(self, error: ServerError, coders: Sequence[CoderId]) -> ServerError:
        """Remember the error of a load: replicas are alike, so that what one cannot load none can."""
        if isinstance(error, ModelUnavailable):
            log.error("%s", error.detail)
            for coder in coders:
                self._failures.note(self, coder, error)
        return error

    async def _described(self, models: Sequence[str], *, is_local_only: bool) -> list[Reply]:
        replicas = self._replicas.options(method_name="describe", stream=True)
        for _ in range(MAX_TRIES):
            try:
                return [reply async for reply in self._replies(replicas, models, is_local_only)]
            except LOST as error:
                log.warning("a replica ended: %s", type(error).__name__)
            except BackPressureError as error:
                raise self._queue_full(error) from None
        raise Broken("the replicas of this server end again and again")

    async def _replies(self, replicas: DeploymentHandle[Any], *arguments: Any) -> AsyncIterator[Reply]:
        """Raises what of Ray's a retry may help, and Unavailable."""
        responses = replicas.remote(*arguments)
        assert isinstance(responses, DeploymentResponseGenerator)
        try:
            async for message in responses:
                reply = msgspec.msgpack.decode(message, type=Reply)
                self._note(reply)
                yield reply
        except asyncio.CancelledError:
            responses.cancel()  # type: ignore[no-untyped-call]  # Ray's
            raise
        except DeploymentUnavailableError:
            raise Broken("the replicas of this server do not start") from None

    def _note(self, reply: Reply) -> None:
        self._held[reply.replica] = reply.held
        self._held.move_to_end(reply.replica)
        if len(self._held) > self.count:
            self._held.popitem(last=False)

    def _count_death(self, pending: Pending) -> None:
        """As the dispatcher does: a pending that was in work, twice, is to blame."""
        pending.tries += 1
        pending.deaths += pending.started is not None
        pending.is_alone, pending.started = pending.deaths > 0, None
        if pending.deaths >= MAX_DEATHS or pending.tries >= MAX_TRIES:
            raise WorkerCrashed("the replica that ran this request ended again") from None

    def _queue_full(self, error: BackPressureError) -> QueueFull:
        wait_s = max(1, math.ceil(self.seconds_ahead))
        return QueueFull(f"{error.message} Try again in {wait_s} s", wait_s)

    async def _is_starting(self) -> bool:
        app, replicas = await self._status()
        if app.status == "DEPLOY_FAILED":
            raise ConfigError("the replicas do not start: a model to preload does not load, or a setting is wrong")
        return replicas.status == "UPDATING" and not self._running_of(replicas)

    async def _keep_counting(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                _, replicas = await self._status()
            except Exception:  # the border of a look: another one follows
                log.exception("the number of replicas is not known")
                continue
            running = self._running_of(replicas)
            self.count = max(1, running)
            while len(self._held) > running:
                self._held.popitem(last=False)

    async def _status(self) -> tuple[Any, Any]:
        """Ray's, of the application and of the replicas' deployment."""
        status = await asyncio.to_thread(serve.status)
        app = status.applications[serve.get_replica_context().app_name]
        return app, app.deployments[self._replicas.deployment_name]

    @staticmethod
    def _running_of(replicas: Any) -> int:
        return sum(count for state, count in replicas.replica_states.items() if state == "RUNNING")


def info_of(reply: Reply) -> ModelInfo:
    """Raises what the replica raised."""
    if reply.failure:
        raise reply.failure.error()
    assert reply.info
    return reply.info
