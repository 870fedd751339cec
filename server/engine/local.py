"""The engine in this process: what handler.py, Ray replicas and fast tests run instead of a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from server.config import Settings
from server.dispatch import Batch, Engine
from server.engine import loader
from server.engine.runner import Runner
from server.errors import ConfigError
from server.types import Done, LoadedInfo, ModelInfo, Operation

HOUSEKEEPING_S = 1.0


class LocalEngine:
    """A Runner for an event loop. A decode that crashes here takes the process along."""

    is_alive = True

    def __init__(self, settings: Settings, on_hang: Callable[[str], None] = lambda _: None) -> None:
        """on_hang: called with the reason when work makes no progress for `hang_timeout_s`; this cannot end it."""
        if settings.options.threads is not None:
            torch.set_num_threads(settings.options.threads)
        self.runner = Runner(settings)
        self.kill = on_hang
        # One more than there are models: one that waits for the hub keeps no other one waiting.
        self._files = ThreadPoolExecutor(1 + len(settings.models), thread_name_prefix="files")
        self._keeping_house: asyncio.Task[None] | None = None

    async def start(self, changed: Callable[[], None]) -> Sequence[Engine]:
        self._keeping_house = asyncio.create_task(self._keep_house())
        return []

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        describe = self.runner.sync.describe
        return await asyncio.get_running_loop().run_in_executor(self._files, describe, model, is_local_only)

    @property
    def steps(self) -> int:
        return self.runner.steps

    def can_run(self, model: str) -> bool:
        return True

    async def load(self, model: str, operation: Operation = Operation.DECODE) -> None:
        once = ThreadPoolExecutor(1, thread_name_prefix="load")  # see Runner.submit
        try:
            await asyncio.get_running_loop().run_in_executor(once, self.runner.sync.load, model, operation)
        finally:
            once.shutdown(wait=False)

    def loaded(self, model: str) -> LoadedInfo | None:
        return self.runner.sync.loaded(model)

    async def run(self, batch: Batch) -> None:
        self.runner.submit([job.request for job in batch.jobs], LoopListener(batch), is_short=batch.is_short)
        await batch.decoded
        await asyncio.wait([job.answer for job in batch.jobs])

    async def close(self) -> None:
        if self._keeping_house:
            self._keeping_house.cancel()
        self.runner.close()
        self._files.shutdown(wait=False, cancel_futures=True)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            await asyncio.get_running_loop().run_in_executor(self._files, self.runner.sync.unload_idle)


class LoopListener:
    """A batch that other threads tell how it goes."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._loop = asyncio.get_running_loop()

    def is_wanted(self, index: int) -> bool:
        return self._batch.jobs[index].is_wanted

    def started(self) -> None:
        self._loop.call_soon_threadsafe(self._batch.start)

    def decoded(self) -> None:
        self._loop.call_soon_threadsafe(self._batch.free_device)

    def done(self, index: int, done: Done) -> None:
        self._loop.call_soon_threadsafe(self._batch.jobs[index].done, done)

    def failed(self, index: int, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._batch.jobs[index].failed, error)


def check_device(settings: Settings) -> torch.device:
    """The device that models without one of their own get. Raises ConfigError."""
    try:
        return loader.choose_device(settings.options.first_device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
