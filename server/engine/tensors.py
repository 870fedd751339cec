"""Convert tensors from and to bytes."""

from __future__ import annotations

import numpy as np
import torch

from ..values import RawTensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_device(tensor: RawTensor, device: torch.device) -> torch.Tensor:
    """Return a received tensor on a device, in float32, in which latents are scaled whatever dtype was sent."""
    # torch.frombuffer needs a writable buffer, although nothing writes to it.
    data = bytearray(tensor.data) if memoryview(tensor.data).readonly else tensor.data
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape).to(device).to(torch.float32)


def to_host(tensor: torch.Tensor) -> RawTensor:
    """Return a tensor as bytes in C order, copied to the host at most once."""
    host = tensor.contiguous().cpu()
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = host.reshape(-1).view(torch.uint8).numpy()
    return RawTensor(tuple(host.shape), NAMES[host.dtype], flat.data)


def is_finite(tensor: RawTensor) -> bool:
    """Return whether no value is NaN or infinite."""
    return bool(torch.isfinite(torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype])).all())
