"""The models of one device: describe, load, run and unload them. Nothing here depends on queues or clients."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..config import ModelEntry, Settings
from ..errors import ModelUnavailable, NonFiniteInput, ServerError, TooLargeForDevice
from ..families import FAMILIES, Family
from ..model_info import CoderId, Direction, LatentSpec, LoadedInfo, ModelInfo
from ..values import Layout, Request, Result, TensorResult
from .coders import custom
from .coders.build import EXACT_CLASSES, build_coder
from .coders.interface import Check, Coder, Decoder, go_on
from .device_errors import is_lost_device, is_out_of_memory, where
from .graphs import clear_graphs
from .loaded_model import LoadedModel
from .pipeline import NonFiniteOutput, Stream, run
from .tensors import NAMES
from .turn import Turn
from .weights import loading, placement
from .weights.companion import load_companion
from .weights.config_json import directions_of, read_info, weigh
from .weights.defaults import whole_config
from .weights.hub import Source, source_of
from .weights.which_config import configuration_of

log = logging.getLogger(__name__)

OVERFLOWS = {
    Direction.DECODE: "these latents overflow the VAE{}; check scaling_factor and dtype",
    Direction.ENCODE: "these pixels overflow the VAE{}; send them in [-1, 1]",
}
STATISTICS = ("latents_mean", "latents_std", "bn.running_mean", "bn.running_var")


class Key(NamedTuple):
    """The unit of loading: one direction of a model.

    is_upcast: the float32 copy that is used after half precision overflowed.
    """

    name: str
    direction: Direction
    is_upcast: bool = False


class WeightsDoNotFit(ModelUnavailable):
    """The device has too little memory for a model's weights, even after the other models were unloaded."""


class NotLoaded(ServerError):
    """Work that runs between the steps of other work needs a model that is not loaded."""


@dataclass(frozen=True, slots=True)
class Located:
    """A model's description, its files, and where it will run. Made once for each load and each `describe`."""

    info: ModelInfo
    source: Source
    device: torch.device


class LoadedModels:
    """The models on one device.

    Every method may be called from any thread. While a model is being loaded, others can run. The least recently used
    models are unloaded to make room; a model is never unloaded while it runs.
    """

    def __init__(self, settings: Settings) -> None:
        # Runs whose `Precision` allows TensorFloat-32 turn it on while they compute.
        torch.backends.cudnn.allow_tf32 = False
        self._settings = settings
        self._turn = Turn()
        self._load_locks: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._loaded: OrderedDict[Key, LoadedModel[Coder]] = OrderedDict()  # the least recently used first
        self._used_at: dict[Key, float] = {}

    def describe(self, name: str, is_local_only: bool = False) -> ModelInfo:
        """Return what config.json says of a model, with the sizes of its weights. Raises ModelUnavailable.

        is_local_only: do not use the network.
        """
        located = self._locate(name, is_local_only=is_local_only)
        precision = self._precision(located, Direction.DECODE)
        weights, found = weigh(located.source, NAMES[precision.dtype]), directions_of(located.source)
        directions = tuple(direction for direction in found if direction in located.info.directions)
        return replace(located.info, weights=weights, directions=directions)

    def loaded(self, name: str) -> LoadedInfo | None:
        """Return what is known of a model with a direction on the device; None if neither direction is loaded."""
        models = [self._loaded.get(Key(name, direction)) for direction in Direction]
        infos = [model.info for model in models if model]
        if len(infos) < len(models):
            return infos[0] if infos else None
        decoder, encoder = infos
        return replace(decoder, encoder=encoder.encoder, note=decoder.note or encoder.note)

    def all_loaded(self) -> dict[str, LoadedInfo]:
        """Return what is known of every model with a direction on the device."""
        return {name: info for name in self._settings.models if (info := self.loaded(name)) is not None}

    def holds(self, coder: CoderId) -> bool:
        """Return whether this direction of a model is loaded."""
        return Key(*coder) in self._loaded

    def load(self, name: str, direction: Direction = Direction.DECODE) -> LoadedModel[Any]:
        """Return one direction of a model, loaded and warmed up. Raises ModelUnavailable."""
        return self._get(Key(name, direction))

    def _get(self, key: Key) -> LoadedModel[Coder]:
        """Load a model if needed and return it. Raises ModelUnavailable, and NotLoaded between steps of other work."""
        if model := self._loaded.get(key):
            return model
        if self._turn.is_mine:  # a load would wait for the turn that this thread has
            raise NotLoaded
        with self._load_locks[key]:
            return self._loaded.get(key) or self._keep(key, self._load(key))

    def run(
        self, requests: Sequence[Request], stream: Stream | None = None, check: Check = go_on
    ) -> list[TensorResult | Exception]:
        """Run requests of one batch now, after loading the model if needed.

        Requests that overflow half precision are run again in float32. Those that do not fit the device's memory are
        run again each time that another model was unloaded, the least recently used one first.

        check: called between the steps of the work. Other threads that want the device get it there too. `check` may
            call `run` for another coder, or for the same one if `LoadedInfo.may_run_inside_itself`. Such a run loads
            nothing.

        Returns a result or an error for each request: NonFiniteInput, BadRequest, TooLargeForDevice.
        Raises ModelUnavailable, NotLoaded, Stopped.
        """
        key = Key(*requests[0].job.coder)
        model = self._get(key)
        outcomes = self._run(key, model, requests, stream, check)
        while any(isinstance(outcome, TooLargeForDevice) for outcome in outcomes) and self._unload_another(
            key, model.device
        ):
            outcomes = [
                self._run(key, model, [request], stream, check)[0]
                if isinstance(outcome, TooLargeForDevice)
                else outcome
                for request, outcome in zip(requests, outcomes, strict=True)
            ]
        is_single = model.dtype is torch.float32
        return [
            self._run_upcast(request, is_single, stream, check) if isinstance(outcome, NonFiniteOutput) else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _run(
        self, key: Key, model: LoadedModel[Any], requests: Sequence[Request], stream: Stream | None, check: Check
    ) -> list[TensorResult | Exception]:
        given_away_s = 0.0  # how long other threads had the device between the steps

        def between_steps() -> None:
            nonlocal given_away_s
            started = time.perf_counter()
            self._turn.give_way()
            check()
            given_away_s += time.perf_counter() - started

        with self._turn, on(model.device):
            self._note_use(key)
            outcomes = run(model, requests, stream, between_steps)
        return [
            replace(outcome, device_ms=max(0.0, outcome.device_ms - given_away_s * 1e3))
            if isinstance(outcome, Result)
            else outcome
            for outcome in outcomes
        ]

    def _run_upcast(
        self, request: Request, is_single: bool, stream: Stream | None, check: Check
    ) -> TensorResult | Exception:
        job = request.job
        key, overflow = Key(*job.coder, is_upcast=True), OVERFLOWS[job.direction]
        if is_single:
            return NonFiniteInput(overflow.format(" even in float32"))
        try:
            model = self._get(key)
        except WeightsDoNotFit:
            told = overflow.format(" in half precision, and its copy in float32 does not fit this server's memory")
            return TooLargeForDevice(told)
        except ModelUnavailable as error:
            if is_lost_device(error.__cause__):
                raise
            return NonFiniteInput(overflow.format(" in half precision, and the model could not be loaded in float32"))
        outcome = self._run(key, model, [request], stream, check)[0]
        if isinstance(outcome, NonFiniteOutput):
            return NonFiniteInput(overflow.format(" even in float32"))
        return replace(outcome, is_upcast=True) if isinstance(outcome, Result) else outcome

    def unload_idle(self) -> list[Key]:
        """Unload the models that were not used for `idle_unload_s`, and return what was unloaded."""
        limit = self._settings.options.idle_unload_s
        if limit is None:
            return []
        oldest = time.monotonic() - limit
        idle = [key for key, used_at in list(self._used_at.items()) if used_at < oldest]
        return self._unload(idle) if idle else []

    def _free_for(self, key: Key, device: torch.device) -> bool:
        """Free the graphs of a device and its least recently used other model. Return whether there was one."""
        with self._turn.after_work():
            clear_graphs(device)
        return self._unload_another(key, device)

    def _unload_another(self, key: Key, device: torch.device) -> bool:
        """Unload the least recently used of the other models on a device. Return whether there was one.

        Between the steps of other work it unloads none and returns False, because that work may use any of them.
        """
        others = [other for other, loaded in self._loaded.items() if other != key and loaded.device == device]
        if not others or self._turn.is_mine:
            return False
        self._unload(others[:1])
        return True

    def _keep(self, key: Key, model: LoadedModel[Coder]) -> LoadedModel[Coder]:
        self._loaded[key] = model
        self._note_use(key)
        self._make_room(0, coming=0)  # another model may have been loaded at the same time
        return model

    def _note_use(self, key: Key) -> None:
        self._used_at[key] = time.monotonic()
        if key in self._loaded:
            self._loaded.move_to_end(key)

    def _make_room(self, needed_bytes: int, coming: int = 1) -> None:
        """Unload the least recently used models until this much more fits `model_memory_mb` and `max_loaded`.

        A single model may exceed the limits. coming: how many models are about to be loaded.
        """
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
        """Free the weights of these models once the work in progress, which may use them, has ended."""
        with self._turn.after_work():
            for key in keys:
                self._loaded.pop(key, None)
                self._used_at.pop(key, None)
                log.info("unloaded %s, %s", key.name, key.direction)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return list(keys)

    def _load(self, key: Key) -> LoadedModel[Coder]:
        """Load one direction of a model, warm it up, and turn every failure into ModelUnavailable.

        When memory runs out, other models of the device are unloaded, one after the other.
        """
        started = time.perf_counter()
        located = self._locate(key.name)
        try:
            model = self._read(located, key)
        except ModelUnavailable:
            raise
        except Exception as error:  # the border of a load: whatever fails, the model is reported as unavailable
            if is_out_of_memory(error):
                error.__traceback__ = None  # which keeps what was loaded until then
                if self._free_for(key, located.device):
                    return self._load(key)
                detail = f"{key.name}: its weights do not fit the memory of {located.device}"
                raise WeightsDoNotFit(key.name, detail) from None
            log.debug("%s failed to load", key.name, exc_info=True)
            detail = f"{key.name}: {key.direction} does not load or warm up: {where(error)}"
            raise ModelUnavailable(key.name, detail) from error
        seconds = time.perf_counter() - started
        log.info(
            "loaded %s for %s on %s in %s (%s), %.1f s",
            *(key.name, key.direction, model.device, NAMES[model.dtype], model.coder.name, seconds),
        )
        return model

    def _read(self, located: Located, key: Key) -> LoadedModel[Coder]:
        info, device, direction = located.info, located.device, key.direction
        entry, options = self._settings.models[key.name], self._settings.options
        family = FAMILIES[info.latents.family]
        precision = placement.UPCAST if key.is_upcast else self._precision(located, direction)
        dtype = precision.dtype
        budget_mb = entry.memory_budget_mb or options.memory_budget_mb
        vae = None if entry.custom_decoder else loading.load_vae(info, located.source, dtype, direction)
        if vae is not None and family.companion:
            vae.add_module(family.companion, load_companion(located.source, family.companion, dtype))
        weight_bytes = _weight_bytes(vae, located.source)
        self._make_room(weight_bytes)
        with self._turn, on(device):
            coder: Any
            if vae is None:
                coder, spec = _custom_decoder(entry, located, family, dtype)
                note: str | None = "models.yaml asks for this class of an installed package"
            else:
                spec = family.refine(info.latents, vae)
                placement.move(vae, device)
                coder, note = build_coder(vae, family, direction, entry.decoder, entry.tiling)
            loaded = LoadedInfo(
                str(device), NAMES[dtype], note=note, dtype_note=precision.reason, statistics=_statistics(vae)
            )
            if direction is Direction.ENCODE:
                loaded = replace(loaded, encoder=coder.name)
            else:
                loaded = replace(loaded, decoder=coder.name)
            model = LoadedModel(
                coder=coder,
                family=family,
                spec=spec,
                device=device,
                dtype=dtype,
                allows_tf32=precision.allows_tf32,
                weight_bytes=weight_bytes,
                info=loaded,
                budget_bytes=budget_mb << 20 if budget_mb else None,
            )
            if direction is Direction.DECODE:
                warm_up(model, entry.warmup)
        return model

    def _locate(self, name: str, *, is_local_only: bool = False) -> Located:
        source = source_of(self._settings, name)
        if refusal := self._settings.refusal_of(name):
            raise source.failure(refusal)
        info = read_info(source, is_local_only=is_local_only)
        try:
            device = self._settings.models[name].device or self._settings.options.first_device
            return Located(info, source, placement.choose_device(device))
        except ValueError as error:
            raise ModelUnavailable(name, f"{name}: {error}") from None

    def _precision(self, located: Located, direction: Direction) -> placement.Precision:
        entry = self._settings.models[located.info.name]
        is_exact = entry.decodes_exactly and located.info.class_name in EXACT_CLASSES[direction]
        wanted = entry.dtype or self._settings.options.dtype
        try:
            return placement.choose_precision(wanted, located.info, located.device, is_exact=is_exact)
        except ValueError as error:
            raise ModelUnavailable(located.info.name, f"{located.info.name}: {error}") from None


def _statistics(vae: torch.nn.Module | None) -> dict[str, tuple[float, ...]]:
    """Return the statistics of the latents that a VAE keeps in its buffers. Most VAEs keep them in their config."""
    buffers = vae.named_buffers() if vae is not None else ()
    return {name: tuple(each.float().tolist()) for name, each in buffers if name in STATISTICS}


def _weight_bytes(vae: torch.nn.Module | None, source: Source) -> int:
    """Return the size of the weights in memory; without a loaded VAE, that of their files."""
    if vae is None:
        return sum(path.stat().st_size for path in source.files().weights)
    return sum(weight.nbytes for weight in vae.parameters() if not weight.is_meta)


def _custom_decoder(
    entry: ModelEntry, located: Located, family: Family, dtype: torch.dtype
) -> tuple[custom.CustomDecoder, LatentSpec]:
    """Return a decoder of an installed package, after trying it, and the spec. Raises ModelUnavailable."""
    name, source, info = str(entry.custom_decoder), located.source, located.info
    files, config = source.files(), whole_config(info.class_name, configuration_of(source).values)
    weights = files.weights[0] if len(files.weights) == 1 else files.folder
    try:
        made = custom.build(name, weights, config, dtype, located.device)
        coder = custom.CustomDecoder(name, made, family, info.latents, dtype, located.device)
        coder.try_out()
        return coder, coder.refined()
    except custom.UnusableDecoder as error:
        raise source.failure(str(error)) from error.__cause__


def on(device: torch.device) -> Any:
    """Return a context in which `device` is the current device, which Triton and CUDA graphs use."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def warm_up(model: LoadedModel[Any], sizes: tuple[tuple[int, int], ...]) -> None:
    """Decode zeros once for each (height, width), so that no request pays for compilation and other set-up."""
    decoder: Decoder = model.coder
    arguments: dict[str, Any] = {"timestep": 0.0} if model.spec.takes_timestep else {}
    for height, width in sizes:
        shape = model.family.latent_shape(model.spec, height, width)
        with torch.inference_mode():
            latents = torch.zeros(shape, device=model.device, dtype=model.dtype)
            with model.precision():
                decoder.decode(latents, Layout.PIXELS, budget_bytes=model.budget_bytes, **arguments)
