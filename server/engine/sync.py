"""The models of one device: describe, load, decode, unload. Callable from any thread; knows no queue and no client."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from server.config import Settings
from server.engine import loader
from server.engine.coder import Check, go_on
from server.engine.decoders import EXACT_CLASSES, build_decoder
from server.engine.encoders import build_encoder
from server.engine.model import LoadedModel
from server.engine.pipeline import NonFiniteOutput, Stream, run
from server.engine.tensors import NAMES
from server.errors import ModelUnavailable, NonFiniteInput, ServerError
from server.families import FAMILIES
from server.types import Computed, Layout, LoadedInfo, ModelInfo, Operation, VAEJob

log = logging.getLogger(__name__)

OVERFLOWS = {
    Operation.DECODE: "these latents overflow the VAE{}; check scaling_factor and dtype",
    Operation.ENCODE: "these pixels overflow the VAE{}; send them in [-1, 1]",
}


class Key(NamedTuple):
    """What is loaded by itself. is_upcast: the second life of a model whose half precision overflowed."""

    name: str
    operation: Operation
    is_upcast: bool = False


class NotLoaded(ServerError):
    """Work that runs between the steps of other work wants a model that is not loaded."""


@dataclass(eq=False)
class Place:
    """A thread in the queue of a Turn. is_patient: it waits for work to end, and does not come between its steps."""

    is_patient: bool = False


class Turn:
    """The right to use the device: one thread at a time, in the order in which they asked.

    A thread that has the turn may enter again. Between the steps of long work it may give way to waiting threads.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Place] = []
        self._owner: int | None = None
        self._depth = 0
        self._is_between_steps = False

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._wait(Place())
                self._owner = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()

    @contextmanager
    def after_work(self) -> Iterator[None]:
        """Have the turn while no work is under way, not even between its steps."""
        with self._changed:
            self._wait(Place(is_patient=True))
            self._owner, self._depth = threading.get_ident(), 1
        try:
            yield
        finally:
            self.__exit__()

    @property
    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    def give_way(self) -> None:
        """Let the threads that wait have the turn first, but for patient ones. Only for the thread that has it."""
        if not any(not place.is_patient for place in self._waiting):
            return
        with self._changed:
            owner, depth = self._owner, self._depth
            self._owner, self._depth, self._is_between_steps = None, 0, True
            self._changed.notify_all()
            self._wait(Place())
            self._owner, self._depth, self._is_between_steps = owner, depth, False

    def _wait(self, place: Place) -> None:
        self._waiting.append(place)
        self._changed.wait_for(lambda: self._owner is None and self._next() is place)
        self._waiting.remove(place)

    def _next(self) -> Place:
        return next(place for place in self._waiting if not (place.is_patient and self._is_between_steps))


class SyncEngine:
    """Loading one model does not keep another from decoding. The least recently used are unloaded, never in use."""

    def __init__(self, settings: Settings) -> None:
        # TensorFloat-32 keeps ten bits of a float32: whoever asks for float32 asks for all of them.
        torch.backends.cudnn.allow_tf32 = False
        self._settings = settings
        self._turn = Turn()
        self._load_locks: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._loaded: OrderedDict[Key, LoadedModel] = OrderedDict()  # the least recently used first
        self._used_at: dict[Key, float] = {}

    def describe(self, name: str, is_local_only: bool = False) -> ModelInfo:
        """What config.json says, and what the weights take. Raises ModelUnavailable."""
        source = loader.source_of(self._settings, name)
        info = loader.read_info(source, is_local_only=is_local_only)
        return replace(info, weights=loader.weigh(source, self._dtype(info, self._device(name), Operation.DECODE)))

    def loaded(self, name: str) -> LoadedInfo | None:
        """None until the weights of a direction are on a device."""
        halves = [self._loaded.get(Key(name, operation)) for operation in Operation]
        infos = [half.info for half in halves if half]
        if len(infos) < len(halves):
            return infos[0] if infos else None
        return replace(infos[0], encoder=infos[1].encoder)

    def holds(self, name: str, operation: Operation) -> bool:
        return Key(name, operation) in self._loaded

    def load(self, name: str, operation: Operation = Operation.DECODE) -> LoadedModel:
        """Return the model's decoder or encoder on its device, loaded and warmed up. Raises ModelUnavailable."""
        return self._get(Key(name, operation))

    def _get(self, key: Key) -> LoadedModel:
        """Return a model, loaded first if needed. Raises ModelUnavailable; between steps of other work NotLoaded."""
        if model := self._loaded.get(key):
            return model
        if self._turn.is_mine:  # a load waits for the turn that this thread has
            raise NotLoaded
        with self._load_locks[key]:
            dtype = torch.float32 if key.is_upcast else None
            return self._loaded.get(key) or self._keep(key, self._read(key.name, key.operation, dtype))

    def run(
        self, jobs: Sequence[VAEJob], stream: Stream | None = None, check: Check = go_on
    ) -> list[Computed | Exception]:
        """Run jobs of one key now, loading first if needed; run again in float32 what half precision overflows.

        check: called between the steps of the work; other threads that want the device get it there too. It may call
        `run` for a job of another key, or of the same one where `LoadedInfo.may_run_inside_itself`; such a run loads
        nothing.
        The errors returned: NonFiniteInput, BadRequest, TooLargeForDevice. Raises ModelUnavailable, NotLoaded, Stopped.
        """
        key = Key(jobs[0].model, jobs[0].operation)
        model = self._get(key)
        outcomes = self._run(key, model, jobs, stream, check)
        is_single = model.dtype is torch.float32
        return [
            self._run_upcast(job, is_single, check) if isinstance(outcome, NonFiniteOutput) else outcome
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    def _run(
        self, key: Key, model: LoadedModel, jobs: Sequence[VAEJob], stream: Stream | None, check: Check
    ) -> list[Computed | Exception]:
        given_away_s = 0.0  # to others, between the steps

        def between_steps() -> None:
            nonlocal given_away_s
            started = time.perf_counter()
            self._turn.give_way()
            check()
            given_away_s += time.perf_counter() - started

        with self._turn, on(model.device):
            self._note_use(key)
            outcomes = run(model, jobs, stream, between_steps)
        return [
            replace(outcome, device_ms=max(0.0, outcome.device_ms - given_away_s * 1e3))
            if isinstance(outcome, Computed)
            else outcome
            for outcome in outcomes
        ]

    def unload_idle(self) -> list[Key]:
        """Unload what was not used for `idle_unload_s`."""
        limit = self._settings.options.idle_unload_s
        if limit is None:
            return []
        oldest = time.monotonic() - limit
        return self._unload([name for name, used_at in list(self._used_at.items()) if used_at < oldest])

    def _run_upcast(self, job: VAEJob, is_single: bool, check: Check) -> Computed | Exception:
        key, overflow = Key(job.model, job.operation, is_upcast=True), OVERFLOWS[job.operation]
        if is_single:
            return NonFiniteInput(overflow.format(" even in float32"))
        try:
            model = self._get(key)
        except ModelUnavailable:
            return NonFiniteInput(overflow.format(" in half precision, and there is no memory for it in float32"))
        outcome = self._run(key, model, [job], None, check)[0]
        if isinstance(outcome, NonFiniteOutput):
            return NonFiniteInput(overflow.format(" even in float32"))
        return replace(outcome, is_upcast=True) if isinstance(outcome, Computed) else outcome

    def _keep(self, key: Key, model: LoadedModel) -> LoadedModel:
        self._loaded[key] = model
        self._note_use(key)
        self._make_room(0, coming=0)  # another one may have come meanwhile
        return model

    def _note_use(self, key: Key) -> None:
        self._used_at[key] = time.monotonic()
        if key in self._loaded:
            self._loaded.move_to_end(key)

    def _make_room(self, needed_bytes: int, coming: int = 1) -> None:
        """Unload the least recently used until this fits `model_memory_mb` and `max_loaded`; one alone always may."""
        options = self._settings.options
        budget = math.inf if options.model_memory_mb is None else options.model_memory_mb << 20
        most = math.inf if options.max_loaded is None else options.max_loaded
        models = list(self._loaded.items())
        leaving: list[Key] = []
        held = sum(model.weight_bytes for _, model in models)
        for key, model in models[: len(models) - 1 + coming]:
            if held + needed_bytes <= budget and len(models) - len(leaving) + coming <= most:
                break
            held -= model.weight_bytes
            leaving.append(key)
        if leaving:
            self._unload(leaving)

    def _unload(self, keys: Sequence[Key]) -> list[Key]:
        """Free the weights of these once the work under way has ended, which may hold them."""
        with self._turn.after_work():
            for key in keys:
                self._loaded.pop(key, None)
                self._used_at.pop(key, None)
                log.info("unloaded %s, %s", key.name, key.operation)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return list(keys)

    def _read(self, name: str, operation: Operation, dtype: torch.dtype | None) -> LoadedModel:
        """One direction of the model as configured, or in another dtype. Raises ModelUnavailable."""
        started = time.perf_counter()
        info, entry, options = self.describe(name), self._settings.models[name], self._settings.options
        family = FAMILIES[info.latents.family]
        device, source = self._device(name), loader.source_of(self._settings, name)
        try:
            dtype = dtype or self._dtype(info, device, operation)
            vae = loader.load_vae(info, source, dtype, operation)
            spec = family.refine(info.latents, vae)
            weight_bytes = sum(weight.nbytes for weight in vae.parameters() if not weight.is_meta)
            self._make_room(weight_bytes)
            budget_mb = entry.memory_budget_mb or options.memory_budget_mb
            with self._turn, on(device):
                move(vae, device)
                model = LoadedModel(
                    family=family,
                    spec=spec,
                    device=device,
                    dtype=dtype,
                    weight_bytes=weight_bytes,
                    info=LoadedInfo(str(device), NAMES[dtype]),
                    budget_bytes=budget_mb << 20 if budget_mb else None,
                )
                if operation is Operation.ENCODE:
                    encoder, note = build_encoder(vae, family, entry.decoder, entry.tiling)
                    info_of_it = replace(model.info, encoder=encoder.name, note=note)
                    model = replace(model, encoder=encoder, info=info_of_it)
                else:
                    decoder, note = build_decoder(vae, family, entry.decoder, entry.tiling)
                    info_of_it = replace(model.info, decoder=decoder.name, note=note)
                    model = replace(model, decoder=decoder, info=info_of_it)
                    warm_up(model, entry.warmup)
        except (torch.OutOfMemoryError, MemoryError):
            raise ModelUnavailable(name, f"{name}: its weights do not fit the memory of {device}") from None
        except ModelUnavailable:
            raise
        except Exception as error:  # the border of a load: whatever fails, the server knows that the model is not there
            log.debug("%s failed to load", name, exc_info=True)
            raise ModelUnavailable(name, f"{name}: {operation} does not load or warm up: {where(error)}") from error
        seconds = time.perf_counter() - started
        log.info(
            "loaded %s for %s on %s in %s (%s), %.1f s",
            *(name, operation, device, NAMES[dtype], model.coder.name, seconds),
        )
        return model

    def _dtype(self, info: ModelInfo, device: torch.device, operation: Operation) -> torch.dtype:
        entry = self._settings.models[info.name]
        is_exact = entry.decodes_exactly and info.class_name in EXACT_CLASSES[operation]
        return loader.choose_dtype(entry.dtype or self._settings.options.dtype, info, device, is_exact=is_exact)

    def _device(self, name: str) -> torch.device:
        try:
            return loader.choose_device(self._settings.models[name].device or self._settings.options.first_device)
        except ValueError as error:
            raise ModelUnavailable(name, f"{name}: {error}") from None


def move(vae: torch.nn.Module, device: torch.device) -> None:
    """To the device, but for what has no weights any more."""
    for child in vae.children():
        if not any(weight.is_meta for weight in child.parameters()):
            child.to(device)
    for name, buffer in vae.named_buffers(recurse=False):
        setattr(vae, name, buffer.to(device))
    for weight in vae.parameters(recurse=False):
        weight.data = weight.data.to(device)


def on(device: torch.device) -> Any:
    """Triton and CUDA graphs use the current device, not the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def where(error: BaseException) -> str:
    """Name an unexpected error in one line: its class, its first line, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    first_line = next(iter(str(error).strip().splitlines()), "")[:300]
    return f"{type(error).__name__}{place}: {first_line}" if first_line else f"{type(error).__name__}{place}"


def warm_up(model: LoadedModel, sizes: tuple[tuple[int, int], ...]) -> None:
    """Decode nothing of each (height, width), so that the first request of that size pays for no set-up."""
    for height, width in sizes:
        shape = model.family.latent_shape(model.spec, height, width)
        with torch.inference_mode():
            assert model.decoder is not None
            arguments = {"timestep": 0.0} if model.spec.takes_timestep else {}
            latents = torch.zeros(shape, device=model.device, dtype=model.dtype)
            model.decoder.decode(
                latents, Layout.PIXELS, budget_bytes=model.budget_bytes, emit=None, check=go_on, **arguments
            )
