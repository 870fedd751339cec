"""One device in this process: its models, its runner, and the threads for loading. Worker and LocalEngine share it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..config import Settings
from ..model_info import CoderId, LoadedInfo, ModelInfo
from ..own_thread import in_own_thread
from ..values import Request
from .models import LoadedModels
from .runner import Listener, Runner

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 1.0


class Host:
    """Runs, describes and loads models. Every method returns at once and may be called from any thread."""

    def __init__(self, settings: Settings, on_unload: Callable[[], None] = lambda: None) -> None:
        """on_unload: called from a thread after models were unloaded because they were idle."""
        if settings.options.threads is not None:
            torch.set_num_threads(settings.options.threads)
        self.models = LoadedModels(settings)
        self._runner = Runner(settings, self.models)
        # One thread more than there are models, so that a model that waits for the network never delays another one.
        self._files = ThreadPoolExecutor(1 + len(settings.models), thread_name_prefix="files")
        self._on_unload = on_unload
        self._closing = threading.Event()

    def start(self) -> None:
        """Begin to unload idle models."""
        threading.Thread(target=self._keep_house, name="house", daemon=True).start()

    @property
    def steps(self) -> int:
        """How many steps of work have begun on the device."""
        return self._runner.steps

    def run(self, requests: Sequence[Request], listener: Listener, *, is_short: bool = False) -> None:
        """Run the requests of one batch. listener: is told what happens to it. is_short: as for `Runner.submit`."""
        self._runner.submit(requests, listener, is_short=is_short)

    def describe(self, model: str, is_local_only: bool = False) -> Future[ModelInfo]:
        """Read a model's config.json. The future raises ModelUnavailable."""
        return self._files.submit(self.models.describe, model, is_local_only)

    def load(self, coder: CoderId) -> Future[LoadedInfo]:
        """Load one direction of a model. The future raises ModelUnavailable."""
        return in_own_thread("load", lambda: self.models.load(*coder).info)

    def close(self) -> None:
        """End the threads. Work in progress is not waited for."""
        self._closing.set()
        self._runner.close()
        self._files.shutdown(wait=False, cancel_futures=True)

    def _keep_house(self) -> None:
        while not self._closing.wait(HOUSEKEEPING_S):
            try:
                if self.models.unload_idle():
                    self._on_unload()
            except Exception:  # the border of a thread: the next look may succeed
                log.exception("idle models could not be unloaded")
