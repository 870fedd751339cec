"""An Engine in this process. Ray replicas, the Endpoints toolkit and fast tests use it instead of a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch

from ..config import Settings
from ..errors import ConfigError
from ..model_info import CoderId, LoadedInfo, ModelInfo
from ..scheduling.engines import Batch, Engine
from ..values import RenderedResult
from .host import Host
from .weights.placement import choose_device


class LocalEngine:
    """A Host for an event loop. A crash of a decode ends this process too."""

    is_alive = True

    def __init__(self, settings: Settings, on_hang: Callable[[str], None] = lambda _: None) -> None:
        """on_hang: called with the reason when work makes no progress for `hang_timeout_s`; threads cannot be ended."""
        self.host = Host(settings)
        self.kill = on_hang

    async def start(self, changed: Callable[[], None]) -> Sequence[Engine]:
        """Begin to unload idle models. Return no further engines. `is_alive` never changes here."""
        self.host.start()
        return []

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Read a model's config.json. Raises ModelUnavailable."""
        return await asyncio.wrap_future(self.host.describe(model, is_local_only))

    @property
    def steps(self) -> int:
        """How many steps of work have begun on the device."""
        return self.host.steps

    def can_run(self, model: str) -> bool:
        """Return True: this is the only engine, so it runs every model."""
        return True

    async def load(self, coder: CoderId) -> None:
        """Load one direction of a model. Raises ModelUnavailable."""
        await asyncio.wrap_future(self.host.load(coder))

    def loaded(self, model: str) -> LoadedInfo | None:
        """Return what is known of a loaded model; None if no direction of it is loaded."""
        return self.host.models.loaded(model)

    async def run(self, batch: Batch) -> None:
        """Compute and render a batch, and return once each of its requests is answered."""
        requests = [pending.request for pending in batch.members]
        self.host.run(requests, LoopListener(batch), is_short=batch.is_short)
        await batch.computed
        await asyncio.wait([pending.answer for pending in batch.members])

    async def close(self) -> None:
        """End the threads. Work in progress is not waited for."""
        self.host.close()


class LoopListener:
    """Passes the calls that other threads make for a batch on to the event loop."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._loop = asyncio.get_running_loop()

    def is_wanted(self, index: int) -> bool:
        """Return whether the client of a request still waits for its answer."""
        return self._batch.members[index].is_wanted

    def started(self) -> None:
        """Note that the device has begun with the batch."""
        self._loop.call_soon_threadsafe(self._batch.note_started)

    def progressed(self, index: int, frames: int) -> None:
        """Note how many frames of a video are done."""
        self._batch.members[index].frames_done = frames

    def emitted(self, index: int, piece: bytes) -> None:
        """Pass on a piece of a streamed answer."""
        self._loop.call_soon_threadsafe(self._batch.members[index].emit, piece)

    def computed(self) -> None:
        """Note that the batch no longer uses the device."""
        self._loop.call_soon_threadsafe(self._batch.note_computed)

    def finished(self, index: int, result: RenderedResult) -> None:
        """Answer a request."""
        self._loop.call_soon_threadsafe(self._batch.members[index].finish, result)

    def failed(self, index: int, error: Exception) -> None:
        """Answer a request with an error."""
        self._loop.call_soon_threadsafe(self._batch.members[index].fail, error)


def check_device(settings: Settings) -> torch.device:
    """Return the device of models whose entry names none. Raises ConfigError if it does not exist."""
    try:
        return choose_device(settings.options.first_device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
