"""The whole story of a batch on the device: bytes -> unpack -> unscale -> decode -> postprocess -> bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from server.engine.decoders import Decoder
from server.errors import NonFiniteInput, ServerError, TooLargeForDevice
from server.families import Family
from server.types import Computed, LatentSpec, Layout, LoadedInfo, RawTensor, VAEJob

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEPS = ("", "free_caches", "smallest_bands")  # of a decode that runs out of memory
NO_MEMORY = ("allocate memory", "out of memory", "alloc_failed")
SMALLEST_BUDGET_BYTES = 1  # an exact decoder then takes its lowest bands and recomputes


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A VAE ready to decode."""

    family: Family
    spec: LatentSpec
    decoder: Decoder
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    info: LoadedInfo


class NonFiniteOutput(ServerError):
    """Half precision overflowed: the decode is worth another try in float32."""


class Stream(Protocol):
    """Where the frames of one clip go as they are done. What was written must not be used once it is abandoned."""

    def write(self, frames: torch.Tensor) -> None: ...

    def abandon(self) -> None: ...


def run(model: LoadedModel, jobs: Sequence[VAEJob], stream: Stream | None = None) -> list[Computed | ServerError]:
    """Decode jobs of one key together; each gets what it would have got alone, or its own error.

    stream: for one job, receives its frames as they are done. The errors: NonFiniteInput, TooLargeForDevice, and
    NonFiniteOutput of a half-precision decode that overflowed.
    """
    try:
        with torch.inference_mode():
            return _run(model, jobs, stream)
    except NonFiniteOutput as error:
        failure: ServerError = error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _free_caches(model)
        failure = _too_large(jobs[0])
    if len(jobs) > 1:  # whoever is to blame, the others must not pay
        return [run(model, [job])[0] for job in jobs]
    return [failure]


def _run(model: LoadedModel, jobs: Sequence[VAEJob], stream: Stream | None) -> list[Computed | ServerError]:
    started = time.perf_counter()
    prepared = [_prepared(model, job) for job in jobs]
    good = [latents for latents in prepared if isinstance(latents, torch.Tensor)]
    if not good:
        return [error for error in prepared if isinstance(error, ServerError)]
    output, oom_steps = _decode(model, torch.cat(good), jobs[0].layout, stream)
    rows = output.shape[0] // sum(len(latents) for latents in good)  # a clip's frames may be the first axis
    parts = iter(torch.split(output, [rows * len(latents) for latents in good]))
    tensors = [to_host(next(parts)) if isinstance(latents, torch.Tensor) else latents for latents in prepared]
    device_ms = (time.perf_counter() - started) * 1e3
    return [
        Computed(tensor, device_ms, len(good), oom_steps) if isinstance(tensor, RawTensor) else tensor
        for tensor in tensors
    ]


def _prepared(model: LoadedModel, job: VAEJob) -> torch.Tensor | ServerError:
    """The latents as the VAE takes them, or why it cannot."""
    latents = to_device(job.tensor, model.device)
    latents = model.family.prepare(latents, model.spec, job.geometry, job.scaling).to(model.dtype)
    if bool(torch.isfinite(latents).all()):
        return latents
    bad = int((~torch.isfinite(latents)).sum())
    return NonFiniteInput(
        f"{bad} of {latents.numel()} latent values are NaN or infinite after unscaling to {NAMES[model.dtype]}; "
        "send finite latents, and check scaling_factor and dtype"
    )


def _decode(
    model: LoadedModel, latents: torch.Tensor, layout: Layout, stream: Stream | None
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Decode, walking down when memory runs out: free the caches, then the smallest bands.

    Returns the steps that were needed too. Raises NonFiniteOutput, and the last step's lack of memory.
    """
    decoder, usual = model.decoder, model.decoder.memory_budget_bytes
    emit = stream.write if stream else None
    steps: list[str] = []
    for step in STEPS:
        if step:
            steps.append(step)
            _free_caches(model)
        try:
            decoder.memory_budget_bytes = SMALLEST_BUDGET_BYTES if step == "smallest_bands" else usual
            output = decoder.decode(latents, layout, emit)
        except Exception as error:  # out of memory has many classes, and whatever it is, the stream's reader must know
            _abandon(stream)
            stream = emit = None
            if not is_out_of_memory(error) or step == STEPS[-1]:
                raise
            continue
        finally:
            decoder.memory_budget_bytes = usual
        if not bool(decoder.finite):
            _abandon(stream)
            raise NonFiniteOutput
        return output, tuple(steps)
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
        graphs = getattr(model.decoder, "graphs", None)
        if graphs is not None:
            graphs.clear()
        torch.cuda.empty_cache()


def _too_large(job: VAEJob) -> TooLargeForDevice:
    g = job.geometry
    return TooLargeForDevice(
        f"{g.batch} x {g.num_frames} x {g.height}x{g.width} does not fit this server's memory; "
        "send fewer or smaller latents per request"
    )


def to_device(tensor: RawTensor, device: torch.device) -> torch.Tensor:
    """Checked bytes to a float32 tensor: the scaling is done in float32 whatever was sent."""
    # torch.frombuffer wants to be able to write; nobody does.
    data = bytearray(tensor.data) if memoryview(tensor.data).readonly else tensor.data
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape).to(device, torch.float32)


def to_host(tensor: torch.Tensor) -> RawTensor:
    """The tensor's bytes, C order, without a second copy of them on the host."""
    host = tensor.contiguous().cpu()
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = host.reshape(-1).view(torch.uint8).numpy()
    return RawTensor(tuple(host.shape), NAMES[host.dtype], flat.data)


def is_finite(tensor: RawTensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype])).all())
