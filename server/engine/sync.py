"""The models of one device: describe, load, decode, unload. Callable from any thread; knows no queue and no client."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from server.config import Settings
from server.engine import loader
from server.engine.decoders import build_decoder
from server.engine.pipeline import NAMES, LoadedModel, NonFiniteOutput, Stream, run
from server.errors import ModelUnavailable, NonFiniteInput, ServerError
from server.families import FAMILIES
from server.types import Computed, Layout, LoadedInfo, ModelInfo, VAEJob

log = logging.getLogger(__name__)

UPCAST = ":float32"  # the second life of a model whose half precision overflowed


class SyncEngine:
    """Loading one model does not keep another from decoding. The least recently used are unloaded, never in use."""

    def __init__(self, settings: Settings) -> None:
        # TensorFloat-32 keeps ten bits of a float32: whoever asks for float32 asks for all of them.
        torch.backends.cudnn.allow_tf32 = False
        self._settings = settings
        self._device_lock = threading.Lock()
        self._load_locks = {name: threading.Lock() for name in settings.models}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # the least recently used first
        self._used_at: dict[str, float] = {}
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
            model = self._loaded.get(name)
            if model is not None:
                return model
            failed_at, failure = self._failed.get(name, (0.0, None))
            if failure and time.monotonic() - failed_at < (failure.retry_after_s or 0):
                # A new one: each raise of the same adds its frames, and what they hold, to its traceback.
                raise ModelUnavailable(failure.model, failure.detail)
            try:
                return self._keep(name, self._read(name, None))
            except ModelUnavailable as error:
                self._failed[name] = time.monotonic(), ModelUnavailable(error.model, error.detail)
                raise

    def decode(self, jobs: Sequence[VAEJob], stream: Stream | None = None) -> list[Computed | ServerError]:
        """Decode jobs of one key now, loading first if it must; what half precision overflows again in float32.

        Raises ModelUnavailable. The errors: NonFiniteInput, TooLargeForDevice.
        """
        model = self.load(jobs[0].model)
        with self._device_lock, on(model.device):
            self._note_use(jobs[0].model)
            outcomes = run(model, jobs, stream)
        return [
            self._decode_upcast(job, model.dtype is torch.float32) if isinstance(outcome, NonFiniteOutput) else outcome
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    def unload_idle(self) -> list[str]:
        """Unload what was not used for `idle_unload_s`; the names."""
        limit = self._settings.options.idle_unload_s
        if limit is None:
            return []
        oldest = time.monotonic() - limit
        return self._unload([name for name, used_at in self._used_at.items() if used_at < oldest])

    def _decode_upcast(self, job: VAEJob, is_single: bool) -> Computed | ServerError:
        name = job.model + UPCAST
        if is_single:
            return NonFiniteInput("these latents overflow the VAE even in float32; check scaling_factor and dtype")
        try:
            with self._load_locks[job.model]:
                model = self._loaded.get(name) or self._keep(name, self._read(job.model, torch.float32))
        except ModelUnavailable:
            return NonFiniteInput(
                "these latents overflow the VAE in half precision, and there is no memory for it in float32; "
                "check scaling_factor and dtype"
            )
        with self._device_lock, on(model.device):
            self._note_use(name)
            outcome = run(model, [job])[0]
        if isinstance(outcome, NonFiniteOutput):
            return NonFiniteInput("these latents overflow the VAE even in float32; check scaling_factor and dtype")
        return replace(outcome, is_upcast=True) if isinstance(outcome, Computed) else outcome

    def _keep(self, key: str, model: LoadedModel) -> LoadedModel:
        self._loaded[key] = model
        self._note_use(key)
        return model

    def _note_use(self, key: str) -> None:
        self._used_at[key] = time.monotonic()
        if key in self._loaded:
            self._loaded.move_to_end(key)

    def _make_room(self, needed_bytes: int) -> None:
        """Unload the least recently used until this fits `model_memory_mb`; what is alone over it may stay."""
        budget_mb = self._settings.options.model_memory_mb
        if budget_mb is None:
            return
        models, leaving = list(self._loaded.items()), []
        held = sum(model.weight_bytes for _, model in models)
        for name, model in models:
            if held + needed_bytes <= budget_mb << 20:
                break
            held -= model.weight_bytes
            leaving.append(name)
        self._unload(leaving)

    def _unload(self, names: Sequence[str]) -> list[str]:
        with self._device_lock:  # nothing decodes
            for name in names:
                self._loaded.pop(name, None)
                self._used_at.pop(name, None)
                log.info("unloaded %s", name)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return list(names)

    def _read(self, name: str, dtype: torch.dtype | None) -> LoadedModel:
        """The model as configured, or in another dtype. Raises ModelUnavailable."""
        started = time.perf_counter()
        info, entry, options = self.describe(name), self._settings.models[name], self._settings.options
        family = FAMILIES[info.latents.family]
        device, source = self._device(name), loader.source_of(self._settings, name)
        try:
            chosen = entry.dtype or options.dtype
            dtype = dtype or loader.choose_dtype(chosen, info, device, is_exact=entry.decodes_exactly)
            vae = loader.load_vae(info, source, dtype)
            weight_bytes = sum(weight.nbytes for weight in vae.parameters())
            self._make_room(weight_bytes)
            budget_mb = entry.memory_budget_mb or options.memory_budget_mb
            with self._device_lock, on(device):
                vae = vae.to(device)
                spec = family.refine(info.latents, vae)
                decoder, note = build_decoder(vae, entry.decoder, entry.tiling, budget_mb << 20 if budget_mb else None)
                known = LoadedInfo(str(device), NAMES[dtype], decoder.name, note)
                model = LoadedModel(family, spec, decoder, device, dtype, weight_bytes, known)
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
