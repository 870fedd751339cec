"""The choice of kernels for a device."""

from __future__ import annotations

import importlib.util

import torch

from .causal_kernels import CausalKernels
from .cpu import CpuKernels
from .reference import Kernels
from .trial import is_faster_in_3d


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels: oneDNN on a CPU, Triton on a CUDA GPU if it is installed, plain torch otherwise.

    dtype: the dtype of weights and activations.
    """
    if device.type == "cpu":
        return CpuKernels(dtype)
    if _has_triton(device):
        from .cuda import TritonKernels

        return TritonKernels()
    return Kernels()


def causal_kernels_for(device: torch.device, dtype: torch.dtype) -> CausalKernels:
    """Return the fastest kernels for a causal coder, with the faster form of its convolutions."""
    kernels = kernels_for(device, dtype)
    if device.type == "cuda" or (isinstance(kernels, CpuKernels) and kernels.prepacks):
        kernels.in_3d = is_faster_in_3d(kernels, device, dtype)
    if _has_triton(device):
        from .cuda_causal import TritonCausalKernels

        return TritonCausalKernels(kernels)
    return CausalKernels(kernels)


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
