"""The choice of kernels for a device."""

from __future__ import annotations

import importlib.util

import torch

from .cpu import CpuKernels
from .reference import Kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels: oneDNN on a CPU, Triton on a CUDA GPU if it is installed, plain torch otherwise.

    dtype: the dtype of weights and activations.
    """
    if device.type == "cpu":
        return CpuKernels(dtype)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from .cuda import TritonKernels

        return TritonKernels()
    return Kernels()
