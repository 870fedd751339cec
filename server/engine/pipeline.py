"""The whole story of a batch on the device: bytes -> unpack -> unscale -> decode -> postprocess -> bytes, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from server.engine.coder import Check, Coded, Emit, Stopped, go_on
from server.engine.encoders.posterior import latents_of
from server.engine.inputs import prepared
from server.engine.model import LoadedModel
from server.engine.postprocess import in_dtype
from server.engine.tensors import NAMES, to_host
from server.errors import ServerError, TooLargeForDevice
from server.types import Computed, Operation, RawTensor, VAEJob

STEPS = ("", "free_caches", "smallest_bands")  # of a batch that runs out of memory
NO_MEMORY = ("allocate memory", "out of memory", "alloc_failed")
SMALLEST_BUDGET_BYTES = 1  # an exact decoder then takes its lowest bands and recomputes


class NonFiniteOutput(ServerError):
    """Half precision overflowed: the batch is worth another try in float32."""


class Stream(Protocol):
    """Where the frames of one clip go as they are done. What was written must not be used once it is abandoned."""

    def write(self, frames: torch.Tensor) -> None: ...

    def abandon(self) -> None: ...


def run(
    model: LoadedModel, jobs: Sequence[VAEJob], stream: Stream | None = None, check: Check = go_on
) -> list[Computed | Exception]:
    """Run jobs of one key together; each gets what it would have got alone, or its own error.

    stream: for one job, receives its frames as they are done. check: called between the steps of the work.
    The errors returned: BadRequest, TooLargeForDevice, NonFiniteOutput where half precision overflowed, and whatever
    torch raises. Raises Stopped.
    """
    try:
        with torch.inference_mode():
            return list(_run(model, jobs, stream, check))
    except Stopped:
        raise
    except Exception as error:  # noqa: BLE001  # one bad item must not fail the batch: each is run again by itself
        failure: Exception = error
    if is_out_of_memory(failure):
        _free_caches(model)
        failure = _too_large(jobs[0])
    if len(jobs) > 1:
        return [run(model, [job], check=check)[0] for job in jobs]
    return [failure]


def _run(
    model: LoadedModel, jobs: Sequence[VAEJob], stream: Stream | None, check: Check
) -> list[Computed | ServerError]:
    started = time.perf_counter()
    inputs = [prepared(model, job) for job in jobs]
    good = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    if not good:
        return [error for error in inputs if isinstance(error, ServerError)]
    compute = _encode if jobs[0].operation is Operation.ENCODE else _decode
    output, oom_steps = compute(model, torch.cat(good), jobs[0], stream, check)
    rows = output.shape[0] // sum(len(tensor) for tensor in good)  # a clip's frames may be the first axis
    parts = iter(torch.split(output, [rows * len(tensor) for tensor in good]))
    outcomes = [
        _answer(model, next(parts), job) if isinstance(tensor, torch.Tensor) else tensor
        for tensor, job in zip(inputs, jobs, strict=True)
    ]
    device_ms = (time.perf_counter() - started) * 1e3
    return [
        Computed(outcome, device_ms, len(good), oom_steps) if isinstance(outcome, RawTensor) else outcome
        for outcome in outcomes
    ]


def _decode(
    model: LoadedModel, latents: torch.Tensor, job: VAEJob, stream: Stream | None, check: Check
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the pixels in the layout asked for, and the steps taken for lack of memory."""
    decoder = model.decoder
    assert decoder is not None

    def compute(budget_bytes: int | None, emit: Emit | None) -> Coded:
        arguments = dict(job.geometry.arguments)
        return decoder.decode(latents, job.layout, budget_bytes=budget_bytes, emit=emit, check=check, **arguments)

    return _within_memory(model, stream, compute)


def _encode(
    model: LoadedModel, pixels: torch.Tensor, job: VAEJob, stream: Stream | None, check: Check
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the posterior's parameters, or latents where there is no posterior, and the steps taken for memory."""
    encoder = model.encoder
    assert encoder is not None

    def compute(budget_bytes: int | None, _emit: Emit | None) -> Coded:
        return encoder.encode(pixels, budget_bytes=budget_bytes, check=check)

    return _within_memory(model, None, compute)


def _answer(model: LoadedModel, output: torch.Tensor, job: VAEJob) -> RawTensor:
    if job.operation is Operation.DECODE:
        return to_host(in_dtype(output, job.output_dtype))
    latents = latents_of(output, job.seed) if model.spec.has_posterior else output
    scaled = model.family.finish(latents.float(), model.spec, job.scaling)
    return to_host(in_dtype(scaled, job.output_dtype or NAMES[model.dtype]))


def _within_memory(
    model: LoadedModel,
    stream: Stream | None,
    compute: Callable[[int | None, Emit | None], Coded],
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Compute; when memory runs out, free the caches and try again, then with the smallest bands.

    compute: takes the memory budget in bytes and where finished frames go. Returns its tensor and the steps that were
    needed. Raises NonFiniteOutput, Stopped, and the lack of memory of the last step.
    """
    emit = stream.write if stream else None
    steps: list[str] = []
    for step in STEPS:
        if step:
            steps.append(step)
            _free_caches(model)
        try:
            coded = compute(SMALLEST_BUDGET_BYTES if step == "smallest_bands" else model.budget_bytes, emit)
        except Exception as error:  # out of memory has many classes, and whatever it is, the stream's reader must know
            _abandon(stream)
            stream = emit = None
            if not is_out_of_memory(error) or step == STEPS[-1]:
                raise
            continue
        if not bool(coded.finite):
            _abandon(stream)
            raise NonFiniteOutput
        return coded.tensor, tuple(steps)
    raise AssertionError("the last step returns or raises")


def _abandon(stream: Stream | None) -> None:
    if stream is not None:
        stream.abandon()


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator, cuBLAS and Triton have no class of their own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def _free_caches(model: LoadedModel) -> None:
    if model.device.type == "cuda":
        graphs = getattr(model.coder, "graphs", None)
        if graphs is not None:
            graphs.clear()
        torch.cuda.empty_cache()


def _too_large(job: VAEJob) -> TooLargeForDevice:
    g = job.geometry
    return TooLargeForDevice(
        f"{g.batch} x {g.num_frames} x {g.height}x{g.width} does not fit this server's memory; "
        "send fewer or smaller ones per request"
    )
