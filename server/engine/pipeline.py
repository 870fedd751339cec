"""The whole story of a request on the device: bytes -> unpack -> unscale -> decode -> postprocess -> bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.decoders import Decoder
from server.errors import NonFiniteInput, TooLargeForDevice
from server.families import Family
from server.types import Decoded, DecodeJob, LatentSpec, LoadedInfo, RawTensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A VAE ready to decode."""

    family: Family
    spec: LatentSpec
    decoder: Decoder
    device: torch.device
    dtype: torch.dtype
    info: LoadedInfo


def run(model: LoadedModel, job: DecodeJob) -> Decoded:
    """Decode one request.

    Raises NonFiniteInput, TooLargeForDevice.
    """
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            latents = to_device(job.tensor, model.device)
            latents = model.family.prepare(latents, model.spec, job.geometry, job.scaling).to(model.dtype)
            _check_finite(latents, model.dtype)
            output = to_host(model.decoder.decode(latents, job.layout))
    except (torch.OutOfMemoryError, MemoryError):
        raise _out_of_memory(model, job) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's CPU allocator has no error class of its own
            raise
        raise _out_of_memory(model, job) from None
    return Decoded(output, (time.perf_counter() - started) * 1e3)


def to_device(tensor: RawTensor, device: torch.device) -> torch.Tensor:
    """Checked bytes to a float32 tensor: the scaling is done in float32 whatever was sent."""
    # A bytearray is writable, which torch.frombuffer wants; nobody writes to it.
    data = tensor.data if isinstance(tensor.data, bytearray) else bytearray(tensor.data)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape).to(device, torch.float32)


def to_host(tensor: torch.Tensor) -> RawTensor:
    """The tensor's bytes, C order, without a second copy of them on the host."""
    host = tensor.contiguous().cpu()
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = host.reshape(-1).view(torch.uint8).numpy()
    return RawTensor(tuple(host.shape), NAMES[host.dtype], flat.data)


def is_finite(tensor: RawTensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype])).all())


def _check_finite(latents: torch.Tensor, dtype: torch.dtype) -> None:
    if bool(torch.isfinite(latents).all()):
        return
    bad = int((~torch.isfinite(latents)).sum())
    raise NonFiniteInput(
        f"{bad} of {latents.numel()} latent values are NaN or infinite after unscaling to {NAMES[dtype]}; "
        "send finite latents, and check scaling_factor and dtype"
    )


def _out_of_memory(model: LoadedModel, job: DecodeJob) -> TooLargeForDevice:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    g = job.geometry
    return TooLargeForDevice(
        f"{g.batch} x {g.num_frames} x {g.height}x{g.width} does not fit this server's memory; "
        "send fewer or smaller latents per request"
    )
