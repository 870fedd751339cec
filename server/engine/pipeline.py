"""A batch on the device: bytes -> unpack -> unscale -> decode -> postprocess -> bytes, or the reverse to encode."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from ..errors import ServerError, TooLargeForDevice
from ..model_info import Direction
from ..values import Job, RawTensor, Request, Result, TensorResult
from .coders.interface import Check, Coded, Decoder, Emit, Encoder, Stopped, go_on
from .coders.layouts import in_dtype
from .coders.posterior import latents_of
from .device_errors import is_out_of_memory
from .graphs import clear_graphs
from .input_tensors import input_tensor
from .loaded_model import LoadedModel
from .memory import free_bytes
from .tensors import NAMES, to_host

SMALLEST_BUDGET_BYTES = 1  # makes an exact decoder use its lowest bands and recompute


class NonFiniteOutput(ServerError):
    """Half precision overflowed. The request may succeed in float32."""


class Stream(Protocol):
    """Takes the frames of one video as soon as they are done."""

    def write(self, frames: torch.Tensor) -> None:
        """Take the next frames."""
        ...

    def rewind(self) -> None:
        """Note that the decode begins again with the first frame, because this attempt failed."""
        ...


def run(
    model: LoadedModel[Any], requests: Sequence[Request], stream: Stream | None = None, check: Check = go_on
) -> list[TensorResult | Exception]:
    """Run the requests of one batch together. Each gets the result that it would have got by itself, or its own error.

    stream: for a single request, receives its frames as they are done. check: called between the steps of the work.
    The errors returned are BadRequest, TooLargeForDevice, NonFiniteOutput if half precision overflowed, and whatever
    torch raises. Raises Stopped.
    """
    try:
        with torch.inference_mode():
            return list(_run(model, requests, stream, check))
    except Stopped:
        raise
    except Exception as error:  # noqa: BLE001  # one bad request must not fail the batch: each is run again by itself
        failure: Exception = error
    if is_out_of_memory(failure):
        failure = _too_large(requests[0].job)  # lets go of the error, whose traceback keeps the activations alive
        _free_caches(model)
    if len(requests) > 1:
        return [run(model, [request], check=check)[0] for request in requests]
    return [failure]


def _run(
    model: LoadedModel[Any], requests: Sequence[Request], stream: Stream | None, check: Check
) -> list[TensorResult | ServerError]:
    started = time.perf_counter()
    inputs = [input_tensor(model, request) for request in requests]
    good = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    if not good:
        return [error for error in inputs if isinstance(error, ServerError)]
    compute = _encode if requests[0].job.direction is Direction.ENCODE else _decode
    output, oom_steps = compute(model, torch.cat(good), requests[0].job, stream, check)
    rows = output.shape[0] // sum(len(tensor) for tensor in good)  # the first axis may count frames
    parts = iter(torch.split(output, [rows * len(tensor) for tensor in good]))
    outcomes = [
        _answer(model, next(parts), request.job) if isinstance(tensor, torch.Tensor) else tensor
        for tensor, request in zip(inputs, requests, strict=True)
    ]
    device_ms = (time.perf_counter() - started) * 1e3
    return [
        Result(outcome, device_ms, batch_size=len(good), oom_steps=oom_steps)
        if isinstance(outcome, RawTensor)
        else outcome
        for outcome in outcomes
    ]


def _decode(
    model: LoadedModel[Decoder], latents: torch.Tensor, job: Job, stream: Stream | None, check: Check
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the pixels in the job's layout, and the measures that were taken when memory ran out."""

    def compute(budget_bytes: int | None, emit: Emit | None) -> Coded:
        arguments = dict(job.geometry.arguments)
        with model.precision():
            return model.coder.decode(
                latents, job.layout, budget_bytes=budget_bytes, emit=emit, check=check, **arguments
            )

    return _within_memory(model, stream, compute)


def _encode(
    model: LoadedModel[Encoder], pixels: torch.Tensor, job: Job, stream: Stream | None, check: Check
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the parameters of the posterior (or latents, without a posterior), and the measures as `_decode` does."""

    def compute(budget_bytes: int | None, _emit: Emit | None) -> Coded:
        with model.precision():
            return model.coder.encode(pixels, budget_bytes=budget_bytes, check=check)

    return _within_memory(model, None, compute)


def _answer(model: LoadedModel[Any], output: torch.Tensor, job: Job) -> RawTensor:
    if job.direction is Direction.DECODE:
        return to_host(in_dtype(output, job.output_dtype))
    if job.is_posterior:
        return to_host(in_dtype(output, job.output_dtype or NAMES[model.dtype]))
    latents = latents_of(output, job.seed) if model.spec.has_posterior else output
    scaled = model.family.latents_out(latents.float(), model.spec, job.scaling)
    return to_host(in_dtype(scaled, job.output_dtype or NAMES[model.dtype]))


def _within_memory(
    model: LoadedModel[Any],
    stream: Stream | None,
    compute: Callable[[int | None, Emit | None], Coded],
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Compute; when memory runs out, try again after each measure of `_measures`.

    compute: takes the memory budget in bytes and the function that receives finished frames. Returns its tensor and the
    measures that were taken. Raises NonFiniteOutput, Stopped, and the error of the last attempt if memory ran out
    again.
    """
    emit = partial(_emit, stream) if stream else None
    measures = _measures(model)
    for count, step in enumerate(measures):
        if step:
            _free_caches(model)
        try:
            coded = compute(_budget_bytes(model, step), emit)
        except Exception as error:  # many classes mean out of memory
            if stream:
                stream.rewind()
            if not is_out_of_memory(error) or step == measures[-1]:
                raise
            continue
        if not bool(coded.finite):
            raise NonFiniteOutput
        return coded.tensor, measures[1 : count + 1]
    raise AssertionError("the last step returns or raises")


def _measures(model: LoadedModel[Any]) -> tuple[str, ...]:
    """Return the measures against running out of memory, one for each attempt. The first attempt is without any.

    A coder that does not heed the budget gets no attempt that would repeat the same allocations.
    """
    if model.coder.heeds_budget:
        return ("", "free_caches", "smallest_bands")
    return ("", "free_caches") if model.device.type == "cuda" else ("",)


def _budget_bytes(model: LoadedModel[Any], step: str) -> int | None:
    """Return the memory budget after a measure: smaller after each one, if the coder heeds it."""
    match step:
        case "free_caches" if model.coder.heeds_budget:
            free = free_bytes(model.device)
            return (free if model.budget_bytes is None else min(free, model.budget_bytes)) // 2
        case "smallest_bands":
            return SMALLEST_BUDGET_BYTES
        case _:
            return model.budget_bytes


def _emit(stream: Stream, frames: torch.Tensor, finite: torch.Tensor) -> None:
    """Pass frames on, unless half precision overflowed: their rounding to uint8 would hide that."""
    if not bool(finite):
        raise NonFiniteOutput
    stream.write(frames)


def _free_caches(model: LoadedModel[Any]) -> None:
    """Free what this model's coder caches, the CUDA graphs of all models on its device, and torch's own cache."""
    model.coder.free_caches()
    clear_graphs(model.device)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _too_large(job: Job) -> TooLargeForDevice:
    g, rate = job.geometry, job.render.sampling_rate
    size = f"{g.batch} x {g.num_frames / rate:.0f} s" if rate else f"{g.batch} x {g.num_frames} x {g.height}x{g.width}"
    return TooLargeForDevice(f"{size} does not fit this server's memory; send fewer or smaller ones per request")
