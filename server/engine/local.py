"""The engine in this process: loads a model when it is first asked for, decodes one request at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from server.config import Settings
from server.engine import loader
from server.engine.decoders import build_decoder
from server.engine.pipeline import NAMES, LoadedModel, run
from server.errors import ConfigError, DeadlinePassed, ModelUnavailable
from server.families import FAMILIES
from server.types import Decoded, DecodeJob, Layout, LoadedInfo, ModelInfo

log = logging.getLogger(__name__)


class SyncEngine:
    """Describe, load and decode, callable from any thread; one lock serialises the torch work."""

    def __init__(self, settings: Settings) -> None:
        # TensorFloat-32 keeps ten bits of a float32: whoever asks for float32 asks for all of them.
        torch.backends.cudnn.allow_tf32 = False
        self._settings = settings
        self._lock = threading.Lock()
        self._infos: dict[str, ModelInfo] = {}
        self._loaded: dict[str, LoadedModel] = {}

    def describe(self, name: str, is_local_only: bool = False) -> ModelInfo:
        """What config.json says; read once. Raises ModelUnavailable."""
        if name not in self._infos:
            source = loader.source_of(self._settings, name)
            self._infos[name] = loader.read_info(source, is_local_only=is_local_only)
        return self._infos[name]

    def loaded(self, name: str) -> LoadedInfo | None:
        """None until the weights are on a device."""
        model = self._loaded.get(name)
        return model.info if model else None

    def load(self, name: str) -> LoadedModel:
        """The model on its device, and warmed up. Raises ModelUnavailable."""
        with self._lock:
            return self._load(name)

    def decode(self, job: DecodeJob, is_wanted: threading.Event | None = None) -> Decoded:
        """Decode now. A job whose `is_wanted` was cleared while it waited never starts: DeadlinePassed."""
        with self._lock:
            if is_wanted is not None and not is_wanted.is_set():
                raise DeadlinePassed("the request was dropped before it started")
            return run(self._load(job.model), job)

    def _load(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            self._loaded[name] = self._read(name)
        return self._loaded[name]

    def _read(self, name: str) -> LoadedModel:
        started = time.perf_counter()
        info, entry = self.describe(name), self._settings.models[name]
        options = self._settings.options
        try:
            device = loader.choose_device(entry.device or options.device)
        except ValueError as error:
            raise ModelUnavailable(name, f"{name}: {error}") from None
        dtype = loader.choose_dtype(entry.dtype or options.dtype, info, device, is_exact=entry.decodes_exactly)
        vae = loader.load_vae(info, loader.source_of(self._settings, name), device, dtype)
        budget_mb = entry.memory_budget_mb or options.memory_budget_mb
        decoder, note = build_decoder(vae, entry.decoder, entry.tiling, budget_mb << 20 if budget_mb else None)
        seconds = time.perf_counter() - started
        log.info("loaded %s on %s in %s, %s decoder, %.1f s", name, device, NAMES[dtype], decoder.name, seconds)
        known = LoadedInfo(str(device), NAMES[dtype], decoder.name, note, seconds)
        model = LoadedModel(FAMILIES[info.latents.family], info.latents, decoder, device, dtype, known)
        self._warm_up(model, entry.warmup)
        return model

    def _warm_up(self, model: LoadedModel, sizes: tuple[tuple[int, int], ...]) -> None:
        factor = model.spec.vae_scale_factor
        for height, width in sizes:
            axes = (1, model.spec.channels, *[1] * (model.spec.kind == "video"), height // factor, width // factor)
            with torch.inference_mode():
                model.decoder.decode(torch.zeros(axes, device=model.device, dtype=model.dtype), Layout.PIXELS)


class LocalEngine:
    """SyncEngine for an event loop: torch in one thread, files and the hub in another, the loop in neither."""

    def __init__(self, settings: Settings) -> None:
        self.sync = SyncEngine(settings)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._files = ThreadPoolExecutor(2, thread_name_prefix="files")

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        return await asyncio.get_running_loop().run_in_executor(self._files, self.sync.describe, model, is_local_only)

    async def load(self, model: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._device, self.sync.load, model)

    def loaded(self, model: str) -> LoadedInfo | None:
        return self.sync.loaded(model)

    async def decode(self, job: DecodeJob) -> Decoded:
        """Cancelling this drops the job if it has not started."""
        is_wanted = threading.Event()
        is_wanted.set()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._device, self.sync.decode, job, is_wanted)
        finally:
            is_wanted.clear()

    def close(self) -> None:
        self._device.shutdown(cancel_futures=True)
        self._files.shutdown(cancel_futures=True)


def check_device(settings: Settings) -> torch.device:
    """The device that models without one of their own get. Raises ConfigError."""
    try:
        return loader.choose_device(settings.options.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
