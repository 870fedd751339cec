"""The choice of kernels for a device."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

from ..device_errors import is_lost_device, is_out_of_memory
from .causal_kernels import CausalKernels
from .cpu import CpuKernels
from .reference import Kernels
from .trial import is_faster_in_3d

log = logging.getLogger(__name__)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels: oneDNN on a CPU, Triton on a CUDA GPU if it works there, plain torch otherwise.

    dtype: the dtype of weights and activations.
    """
    if device.type == "cpu":
        return CpuKernels(dtype)
    if device.type != "cuda":
        return Kernels()
    problem = triton_problem(device)
    if problem is None:
        from .cuda import TritonKernels

        return TritonKernels()
    return Kernels(note=problem)


def causal_kernels_for(device: torch.device, dtype: torch.dtype) -> CausalKernels:
    """Return the fastest kernels for a causal coder, with the faster form of its convolutions."""
    kernels = kernels_for(device, dtype)
    if device.type == "cuda" or (isinstance(kernels, CpuKernels) and kernels.prepacks):
        kernels.in_3d = is_faster_in_3d(kernels, device, dtype)
    if device.type == "cuda" and triton_problem(device) is None:
        from .cuda_causal import TritonCausalKernels

        return TritonCausalKernels(kernels)
    return CausalKernels(kernels)


@cache
def triton_problem(device: torch.device) -> str | None:
    """Return why Triton cannot run on a CUDA GPU, one sentence; None if it can. Tried once for each device.

    It needs a C compiler, a folder for what it compiles, and a GPU that is not too old. Raises what torch raises if
    memory runs out or the device is lost, which says nothing of Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so plain torch kernels run, which are slower."
    try:
        from .cuda import TritonKernels

        TritonKernels().moments(torch.zeros(1, 1, 1, 32, device=device), 1)
    except Exception as error:  # whatever Triton or its compiler raises, torch's own kernels still run
        if is_out_of_memory(error) or is_lost_device(error):
            raise
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        cause = f"{type(error).__name__}: {first_line}"
        note = f"Triton does not work here ({cause}), so plain torch kernels run, which are slower."
        log.warning("%s: %s", device, note)
        return note
    return None
