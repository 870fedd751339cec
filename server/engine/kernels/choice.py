"""Which kernels a device runs."""

from __future__ import annotations

import importlib.util

import torch

from .cpu import CpuKernels
from .reference import Kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels for a device: oneDNN's on a CPU, Triton's on a GPU, plain torch everywhere else."""
    if device.type == "cpu":
        return CpuKernels(dtype)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from .cuda import TritonKernels

        return TritonKernels()
    return Kernels()
