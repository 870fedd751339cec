"""The replicas of a Ray cluster as Devices.

Ray queues the requests, routes them and scales the replicas. Requests whose replica ended are sent again.
"""

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

LOST = (RayActorError, ReplicaUnavailableError, OutOfMemoryError, NodeDiedError, ObjectLostError)  # a replica ended
PAUSE_S = 1.0  # before a request that Ray had accepted is sent again
LOOK_EVERY_S = 2.0  # the time between two checks of the number of replicas


class Ask(msgspec.Struct, frozen=True):
    """A request on its way to a replica.

    seconds, is_alone, least_seconds: see `Pending`.
    patience_s: the time until its deadline, in seconds. It is relative because the clocks of two nodes differ.
    """

    request: Request
    seconds: float
    patience_s: float
    is_alone: bool
    least_seconds: float = 0.0

    @staticmethod
    def of(pending: Pending) -> Ask:
        """Return the message for a request of the front."""
        patience_s = pending.deadline - asyncio.get_running_loop().time()
        return Ask(pending.request, pending.seconds, patience_s, pending.is_alone, pending.least_seconds)

    def pending(self) -> Pending:
        """Return the entry for the queue of the replica."""
        deadline = asyncio.get_running_loop().time() + self.patience_s
        return Pending.of(
            self.request,
            seconds=self.seconds,
            least_seconds=self.least_seconds,
            deadline=deadline,
            is_alone=self.is_alone,
        )


class Reply(msgspec.Struct, frozen=True):
    """A message from a replica. One without result, info and failure says that the device has begun the request.

    replica: the id of the replica. held: the models that it has loaded.
    """

    replica: str
    held: dict[str, LoadedInfo]
    result: RenderedResult | None = None
    info: ModelInfo | None = None
    failure: Failure | None = None


def id_of(coder: CoderId) -> str:
    """Return the name of a coder for Ray's model multiplexing."""
    return f"{coder.model}/{coder.direction}"


def coder_of(model_id: str) -> CoderId:
    """Return the coder of a name that `id_of` made."""
    model, _, direction = model_id.partition("/")
    return CoderId(model, Direction(direction))


class RayDevices:
    """The replicas of one deployment. The public methods are described in `Devices`.

    There is no queue here: every request goes to Ray's router immediately.

    count: the number of running replicas, at least 1.
    """

    is_alive = True  # requests wait while Ray restarts a replica, or starts the first one

    def __init__(self, replicas: DeploymentHandle[Any], models: Sequence[str]) -> None:
        """Make the devices. replicas: the handle of the deployment. models: the names of all models."""
        self.count = 1
        self._replicas = replicas
        self._models = models
        self._here: list[Reply] = []  # what the local files say about each model, read once
        self._pendings: set[Pending] = set()
        self._failures = LoadFailures(lambda: asyncio.get_running_loop().time())
        self._held: OrderedDict[str, dict[str, LoadedInfo]] = OrderedDict()  # by replica, the last sender at the end
        self._counting: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of requests that no device has begun."""
        return len(self._pendings) - self.running

    @property
    def running(self) -> int:
        """The number of requests that a device has begun and that have no answer yet."""
        return sum(pending.started is not None for pending in self._pendings)

    @property
    def seconds_ahead(self) -> float:
        """The estimated time, in seconds, until all present requests are done."""
        return sum(pending.seconds for pending in self._pendings) / self.count

    def place_of(self, pending: Pending) -> tuple[int, float]:
        """Return 0 twice: a request is with Ray's router at once, which tells nothing of its queue."""
        return 0, 0.0

    async def start(self) -> None:
        """Wait until a replica is running, or Ray starts none. Raises ConfigError if the replicas cannot start."""
        while True:
            if not await self._is_starting():
                break
            await asyncio.sleep(LOOK_EVERY_S)
        self._counting = asyncio.create_task(self._keep_counting())

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Have a replica read a model's config.json. Raises ModelUnavailable."""
        if not is_local_only:
            reply = (await self._described([model], is_local_only=False))[0]
            try:
                return info_of(reply)
            except ServerError as error:
                raise self._noted(error, [CoderId(model, direction) for direction in Direction]) from None
        if not self._here:  # all models in one call, because a replica has few places for calls
            self._here = await self._described(self._models, is_local_only=True)
        return info_of(self._here[self._models.index(model)])

    async def load(self, coder: CoderId) -> None:
        """Do nothing: each replica loads the models with `preload` or `warmup` before Ray counts it as running."""

    def loaded(self, model: str) -> list[LoadedInfo]:
        """Return one entry for each replica that has the model loaded."""
        return [held[model] for held in self._held.values() if model in held]

    def load_failure(self, coder: CoderId) -> ModelUnavailable | None:
        """Return why a coder did not load; None if a replica has it.

        One replica may lack the memory or the network that another one has, so a failure does not count if any replica
        has the coder loaded.
        """
        if any(info.runs(coder.direction) for info in self.loaded(coder.model)):
            return None
        return self._failures.find([self], coder)

    async def answer(self, pending: Pending) -> RenderedResult:
        """Send a request to a replica and wait for its result. Sends it again if the replica ends."""
        if failure := self.load_failure(pending.coder):
            raise failure
        self._pendings.add(pending)
        try:
            while True:
                try:
                    return await self._ask(pending)
                except LOST as error:
                    log.warning("a replica ended while it had a request: %s", type(error).__name__)
                    self._count_death(pending)
                except BackPressureError as error:
                    if not pending.tries:
                        raise self._queue_full(error) from None
                    await asyncio.sleep(PAUSE_S)  # the request was accepted before, so it is not refused now
        finally:
            self._pendings.discard(pending)

    def kill(self) -> None:
        """Do nothing: Ray ends the replicas."""

    async def close(self) -> None:
        """Stop counting the replicas."""
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
        """Remember the error of a load, and return it.

        It counts for all replicas, because they are alike: what one cannot load, the others cannot load either.
        """
        if isinstance(error, ModelUnavailable):
            log.error("%s", error.detail)
            for coder in coders:
                self._failures.note(self, coder, error)
        return error

    async def _described(self, models: Sequence[str], *, is_local_only: bool) -> list[Reply]:
        """Have a replica describe models, and return a reply for each. Tries again if the replica ends."""
        replicas = self._replicas.options(method_name="describe", stream=True)
        for _ in range(MAX_TRIES):
            try:
                return [reply async for reply in self._replies(replicas, models, is_local_only)]
            except LOST as error:
                log.warning("a replica ended: %s", type(error).__name__)
            except BackPressureError as error:
                raise self._queue_full(error) from None
        raise Broken("the replicas of this server crash repeatedly")

    async def _replies(self, replicas: DeploymentHandle[Any], *arguments: Any) -> AsyncIterator[Reply]:
        """Call a replica and yield its replies.

        Raises Ray's errors for which a retry may help, and Broken if the replicas do not start.
        """
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
        """Remember which models a replica has loaded."""
        self._held[reply.replica] = reply.held
        self._held.move_to_end(reply.replica)
        if len(self._held) > self.count:
            self._held.popitem(last=False)

    def _count_death(self, pending: Pending) -> None:
        """Count an attempt that the end of a replica ended, as the dispatcher does.

        Raises WorkerCrashed if the request was running on MAX_DEATHS replicas that ended, or after MAX_TRIES attempts.
        """
        pending.tries += 1
        pending.deaths += pending.started is not None
        pending.is_alone, pending.started = pending.deaths > 0, None
        if pending.deaths >= MAX_DEATHS or pending.tries >= MAX_TRIES:
            raise WorkerCrashed("the replica crashed again while it had this request") from None

    def _queue_full(self, error: BackPressureError) -> QueueFull:
        """Return the error for a request that Ray refused."""
        wait_s = max(1, math.ceil(self.seconds_ahead))
        return QueueFull(f"{error.message} Try again in {wait_s} s", wait_s)

    async def _is_starting(self) -> bool:
        """Return whether the first replica is still starting. Raises ConfigError if it cannot start."""
        app, replicas = await self._status()
        if app.status == "DEPLOY_FAILED":
            raise ConfigError("the replicas do not start: a model to preload does not load, or a setting is wrong")
        return replicas.status == "UPDATING" and not self._running_of(replicas)

    async def _keep_counting(self) -> None:
        """Count the running replicas every LOOK_EVERY_S."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                _, replicas = await self._status()
            except Exception:  # whatever went wrong, the next attempt may succeed
                log.exception("the replicas could not be counted")
                continue
            running = self._running_of(replicas)
            self.count = max(1, running)
            while len(self._held) > running:
                self._held.popitem(last=False)

    async def _status(self) -> tuple[Any, Any]:
        """Return Ray's status of the application and of the deployment of the replicas."""
        status = await asyncio.to_thread(serve.status)
        app = status.applications[serve.get_replica_context().app_name]
        return app, app.deployments[self._replicas.deployment_name]

    @staticmethod
    def _running_of(replicas: Any) -> int:
        return sum(count for state, count in replicas.replica_states.items() if state == "RUNNING")


def info_of(reply: Reply) -> ModelInfo:
    """Return the description in a reply. Raises the error in it, if there is one."""
    if reply.failure:
        raise reply.failure.error()
    assert reply.info
    return reply.info
