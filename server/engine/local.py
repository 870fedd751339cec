"""The engine in this process: loads a model when it is first asked for, decodes one request at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from server.config import Settings
from server.engine import loader
from server.engine.decoders import build_decoder
from server.engine.pipeline import NAMES, LoadedModel, run
from server.errors import ConfigError, ModelUnavailable
from server.families import FAMILIES
from server.types import Decoded, DecodeJob, Layout, LoadedInfo, ModelInfo

log = logging.getLogger(__name__)


class SyncEngine:
    """Describe, load and decode, callable from any thread. Loading one model does not keep another from decoding."""

    def __init__(self, settings: Settings) -> None:
        # TensorFloat-32 keeps ten bits of a float32: whoever asks for float32 asks for all of them.
        torch.backends.cudnn.allow_tf32 = False
        self._settings = settings
        self._device_lock = threading.Lock()
        self._load_locks = {name: threading.Lock() for name in settings.models}
        self._loaded: dict[str, LoadedModel] = {}
        self._failed: dict[str, tuple[float, ModelUnavailable]] = {}

    def describe(self, name: str, is_local_only: bool = False) -> ModelInfo:
        """What config.json says. Raises ModelUnavailable."""
        return loader.read_info(loader.source_of(self._settings, name), is_local_only=is_local_only)

    def loaded(self, name: str) -> LoadedInfo | None:
        """None until the weights are on a device."""
        model = self._loaded.get(name)
        return model.info if model else None

    def load(self, name: str) -> LoadedModel:
        """The model on its device, and warmed up.

        Raises ModelUnavailable; the same one again, without another try, for as long as clients were told to wait.
        """
        with self._load_locks[name]:
            if name in self._loaded:
                return self._loaded[name]
            failed_at, failure = self._failed.get(name, (0.0, None))
            if failure and time.monotonic() - failed_at < (failure.retry_after_s or 0):
                raise failure
            try:
                self._loaded[name] = self._read(name)
            except ModelUnavailable as error:
                self._failed[name] = time.monotonic(), error
                raise
            return self._loaded[name]

    def decode(self, job: DecodeJob) -> Decoded:
        """Decode now, loading first if it must. Raises ModelUnavailable, NonFiniteInput, TooLargeForDevice."""
        model = self.load(job.model)
        with self._device_lock, on(model.device):
            return run(model, job)

    def _read(self, name: str) -> LoadedModel:
        started = time.perf_counter()
        info, entry, options = self.describe(name), self._settings.models[name], self._settings.options
        family = FAMILIES[info.latents.family]
        device = self._device(name)
        try:
            dtype = loader.choose_dtype(entry.dtype or options.dtype, info, device, is_exact=entry.decodes_exactly)
            vae = loader.load_vae(info, loader.source_of(self._settings, name), dtype)
            budget_mb = entry.memory_budget_mb or options.memory_budget_mb
            with self._device_lock, on(device):
                vae = vae.to(device)
                spec = family.refine(info.latents, vae)
                decoder, note = build_decoder(vae, entry.decoder, entry.tiling, budget_mb << 20 if budget_mb else None)
                known = LoadedInfo(str(device), NAMES[dtype], decoder.name, note)
                model = LoadedModel(family, spec, decoder, device, dtype, known)
                warm_up(model, entry.warmup)
        except (torch.OutOfMemoryError, MemoryError):
            raise ModelUnavailable(name, f"{name}: its weights do not fit the memory of {device}") from None
        except ModelUnavailable:
            raise
        except Exception as error:  # the border of a load: whatever fails, the server knows that the model is not there
            log.exception("%s failed to load", name)
            detail = f"{name}: it does not load or warm up ({type(error).__name__}); the log above says where"
            raise ModelUnavailable(name, detail) from error
        seconds = time.perf_counter() - started
        log.info("loaded %s on %s in %s, %s decoder, %.1f s", name, device, NAMES[dtype], decoder.name, seconds)
        return model

    def _device(self, name: str) -> torch.device:
        try:
            return loader.choose_device(self._settings.models[name].device or self._settings.options.device)
        except ValueError as error:
            raise ModelUnavailable(name, f"{name}: {error}") from None


def on(device: torch.device) -> Any:
    """Triton and CUDA graphs use the current device, not the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def warm_up(model: LoadedModel, sizes: tuple[tuple[int, int], ...]) -> None:
    """Decode nothing of each (height, width), so that the first request of that size pays for no set-up."""
    for height, width in sizes:
        shape = model.family.latent_shape(model.spec, height, width)
        with torch.inference_mode():
            model.decoder.decode(torch.zeros(shape, device=model.device, dtype=model.dtype), Layout.PIXELS)


class LocalEngine:
    """SyncEngine for an event loop: decodes in one thread, files, the hub and loading in others."""

    def __init__(self, settings: Settings) -> None:
        self.sync = SyncEngine(settings)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._files = ThreadPoolExecutor(2, thread_name_prefix="files")

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        return await asyncio.get_running_loop().run_in_executor(self._files, self.sync.describe, model, is_local_only)

    async def load(self, model: str) -> None:
        if self.sync.loaded(model) is not None:
            return
        # A thread that ends with the load. Each thread that ever ran torch keeps its OpenMP workers, and once there are
        # more of those than cores, libgomp stops waiting actively: a 512² demo decode then takes 330 ms, not 220.
        once = ThreadPoolExecutor(1, thread_name_prefix="load")
        try:
            await asyncio.get_running_loop().run_in_executor(once, self.sync.load, model)
        finally:
            once.shutdown(wait=False)

    def loaded(self, model: str) -> LoadedInfo | None:
        return self.sync.loaded(model)

    async def decode(self, job: DecodeJob) -> Decoded:
        """Cancelling this drops the job if it has not started."""
        await self.load(job.model)
        return await asyncio.get_running_loop().run_in_executor(self._device, self.sync.decode, job)

    def close(self) -> None:
        for pool in (self._device, self._files):
            pool.shutdown(wait=False, cancel_futures=True)


def check_device(settings: Settings) -> torch.device:
    """The device that models without one of their own get. Raises ConfigError."""
    try:
        return loader.choose_device(settings.options.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
