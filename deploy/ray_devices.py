"""A cluster's replicas as Devices: Ray queues, routes and scales; what a replica's death interrupts is asked again."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import msgspec
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from server.dispatch import Job
from server.engine.messages import Failure
from server.errors import QueueFull, Unavailable, WorkerCrashed
from server.types import Done, Half, LoadedInfo, ModelInfo, Operation, VAERequest

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
MAX_TRIES = 3  # nobody can tell whose decode ended a replica: those that it had, all have one try less


class Ask(msgspec.Struct, frozen=True):
    """A request on its way to a replica. patience_s: until its deadline, for clocks differ."""

    request: VAERequest
    seconds: float
    patience_s: float
    is_alone: bool

    @staticmethod
    def of(job: Job) -> Ask:
        now = asyncio.get_running_loop().time()
        return Ask(job.request, job.seconds, job.deadline - now, job.is_alone)

    def job(self) -> Job:
        loop, work = asyncio.get_running_loop(), self.request.job
        half = Half(work.model, work.operation)
        return Job(
            model=half,
            key=(half, work.geometry.key, work.layout),
            pixels=work.geometry.pixels,
            seconds=self.seconds,
            arrived=loop.time(),
            deadline=loop.time() + self.patience_s,
            request=self.request,
            answer=loop.create_future(),
            is_alone=self.is_alone,
        )


class Reply(msgspec.Struct, frozen=True):
    """A replica's, one of the three."""

    done: Done | None = None
    info: ModelInfo | None = None
    failure: Failure | None = None


def id_of(half: Half) -> str:
    """The name that Ray's multiplexing knows half a model by."""
    return f"{half.model}/{half.operation}"


def half_of(model_id: str) -> Half:
    model, _, operation = model_id.partition("/")
    return Half(model, Operation(operation))


class RayDevices:
    """The replicas of one deployment. There is no queue here: every job goes to Ray's router at once."""

    is_alive = True  # a job waits while Ray brings a replica back, or starts the first one

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas
        self._jobs: set[Job] = set()
        self._held: list[dict[str, LoadedInfo]] = []  # by each replica, when last asked
        self._watching: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        return max(1, len(self._held))

    @property
    def waiting(self) -> int:
        return len(self._jobs) - self.running

    @property
    def running(self) -> int:
        """As if each replica had begun one: which they have, they do not tell."""
        return min(len(self._jobs), self.count)

    @property
    def seconds_ahead(self) -> float:
        return sum(job.seconds for job in self._jobs) / self.count

    async def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        info = read(await self._replicas.describe.remote(model, is_local_only)).info
        assert info is not None
        return info

    async def load(self, model: str) -> None:
        """Each replica loads what must be there before Ray counts it among them."""

    def loaded(self, model: str) -> list[LoadedInfo]:
        return [held[model] for held in self._held if model in held]

    async def answer(self, job: Job) -> Done:
        self._jobs.add(job)
        try:
            done = await self._ask_until_answered(job)
        except BackPressureError as error:
            wait_s = max(1, math.ceil(self.seconds_ahead))
            raise QueueFull(f"{error.message} Try again in {wait_s} s", wait_s) from None
        except DeploymentUnavailableError:
            raise Unavailable("the replicas of this server do not start; its log says why, tell its operator") from None
        finally:
            self._jobs.discard(job)
        job.started = asyncio.get_running_loop().time() - (done.device_ms + done.render_ms) / 1e3
        return done

    async def close(self) -> None:
        if self._watching:
            self._watching.cancel()

    async def _ask_until_answered(self, job: Job) -> Done:
        replicas = self._replicas.options(method_name="run", multiplexed_model_id=id_of(job.model))
        while True:
            response = replicas.remote(msgspec.msgpack.encode(Ask.of(job)))
            try:
                done = read(await response).done
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]  # Ray's
                raise
            except (RayActorError, ReplicaUnavailableError) as error:
                log.warning("a replica ended with a request in hand: %s", type(error).__name__)
                job.tries += 1
                job.is_alone = True
                if job.tries == MAX_TRIES:
                    raise WorkerCrashed(
                        "the replica that decoded this ended again; the server's log says why"
                    ) from None
            else:
                assert done is not None
                return done

    async def _watch(self) -> None:
        while True:
            try:
                told = await self._replicas.broadcast("loaded").results_async(timeout_s=LOOK_EVERY_S)
            except DeploymentUnavailableError:  # there is none
                told = []
            except (RayError, TimeoutError):  # one ended meanwhile, or starts
                told = None
            if told is not None:
                self._held = [msgspec.msgpack.decode(held, type=dict[str, LoadedInfo]) for held in told]
            await asyncio.sleep(LOOK_EVERY_S)


def read(message: bytes) -> Reply:
    """Raises what the replica raised."""
    reply = msgspec.msgpack.decode(message, type=Reply)
    if reply.failure:
        raise reply.failure.error()
    return reply
