"""An engine without a device. A test decides what it has loaded, how long its work takes and how it fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from server.config import ModelEntry, ServerOptions, Settings
from server.errors import ModelUnavailable
from server.model_info import CoderId, Direction, LatentSpec, Limits, LoadedInfo, ModelInfo
from server.scheduling.engines import Batch, Pending, WorkerDied
from server.values import Geometry, Rendered, Request, Result
from tests.requests import decode_job


def request(model: str = "sd", side: int = 256, direction: Direction = Direction.DECODE) -> Request:
    """Return a request for one image of `side` by `side` pixels."""
    geometry = Geometry((1, 4, side // 8, side // 8), is_packed=False, num_frames=1, height=side, width=side)
    job = decode_job(model, geometry, direction=direction)
    return Request(job, memoryview(bytes(job.bytes_needed)))


def pending(
    model: str = "sd",
    *,
    side: int = 256,
    seconds: float = 0.1,
    within_s: float = 300.0,
    least_seconds: float = 0.0,
    direction: Direction = Direction.DECODE,
) -> Pending:
    """Return the queue's entry of a request that arrives now.

    seconds: its estimated time on a device. within_s: the time until its deadline. least_seconds: its lowest estimate.
    """
    deadline = asyncio.get_running_loop().time() + within_s
    asked = request(model, side, direction)
    return Pending.of(asked, seconds=seconds, deadline=deadline, least_seconds=least_seconds)


def info(model: str) -> ModelInfo:
    """Return what is known of a fake model."""
    spec = LatentSpec(family="kl", kind="image", channels=4, vae_scale_factor=8)
    return ModelInfo(model, spec, Limits(), "AutoencoderKL")


class FakeEngine:
    """One device, which runs one batch at a time, and short batches between the steps of another. See `Engine`.

    held: the coders that are loaded.
    load_s: how long a load takes, in seconds.
    fails: the errors of the coders that do not load.
    takes: returns how long a batch really takes, in seconds; by default, as long as was estimated.
    hangs: batches begin and never end.
    coder: the name of the loaded coders.
    loads: how often each coder was loaded.
    batches, killed: the batches that it was given, and the reasons for which it was killed.
    """

    def __init__(self, *held: str, load_s: float = 0.0) -> None:
        """Make an engine that has both directions of these models loaded."""
        self.is_alive = True
        self.steps = 0
        self.held = {CoderId(model, direction) for model in held for direction in Direction}
        self.load_s = load_s
        self.fails: dict[CoderId, ModelUnavailable] = {}
        self.takes: Callable[[Batch], float] = lambda batch: batch.seconds
        self.hangs = False
        self.coder = "exact"
        self.loads: Counter[CoderId] = Counter()
        self.batches: list[Batch] = []
        self.killed: list[str] = []
        self._died = asyncio.get_running_loop().create_future()
        self._device = asyncio.Lock()
        self._changed: Callable[[], None] = lambda: None

    async def start(self, changed: Callable[[], None]) -> Sequence[FakeEngine]:
        self._changed = changed
        return []

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        if failure := self.fails.get(CoderId(model)):
            raise failure
        return info(model)

    def can_run(self, model: str) -> bool:
        return True

    async def load(self, coder: CoderId) -> None:
        self.loads[coder] += 1
        await asyncio.sleep(self.load_s)
        if failure := self.fails.get(coder):
            raise failure
        self.held.add(coder)

    def loaded(self, model: str) -> LoadedInfo | None:
        names = [self.coder if CoderId(model, direction) in self.held else None for direction in Direction]
        return LoadedInfo("cpu", "float32", *names) if any(names) else None

    async def run(self, batch: Batch) -> None:
        self.batches.append(batch)
        work, died = asyncio.ensure_future(self._run(batch)), self._died
        await asyncio.wait([work, died], return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            work.cancel()
            raise WorkerDied
        await work

    async def _run(self, batch: Batch) -> None:
        if batch.is_short:
            await self._compute(batch)
        else:
            async with self._device:
                await self._compute(batch)
        for one in batch.members:
            rendered = Rendered(memoryview(b"image"), "image/png")
            one.finish(Result(rendered, self.takes(batch) * 1e3, batch_size=len(batch.members)))

    async def _compute(self, batch: Batch) -> None:
        batch.note_started()
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        steps = 10
        for _ in range(steps):
            await asyncio.sleep(self.takes(batch) / steps)
            self.steps += 1
            if not any(one.is_wanted for one in batch.members):
                break
        batch.note_computed()

    def kill(self, reason: str) -> None:
        self.killed.append(reason)
        self.die()
        self.come_back()

    def die(self) -> None:
        """End like a worker process: the running batches are lost, and nothing is loaded any more."""
        self.is_alive = False
        self.held.clear()
        self._died.set_result(None)
        self._changed()

    def come_back(self) -> None:
        """Run again, as after a restart of the worker process."""
        self.is_alive, self.hangs = True, False
        self._died = asyncio.get_running_loop().create_future()
        self._device = asyncio.Lock()
        self._changed()

    async def close(self) -> None:
        pass


def settings_for(*models: str, **flags: object) -> Settings:
    """Return the settings of a server with models that do not exist on disk; the first is the default.

    flags: options of `serve`.
    """
    entries = {name: ModelEntry(repo=f"/nowhere/{name}") for name in models}
    return Settings(
        options=ServerOptions(**flags), source=Path("/nowhere/models.yaml"), default=models[0], models=entries
    )
