"""What the device offers: its kernels, and the memory that is free."""

from __future__ import annotations

import importlib.util

import psutil
import torch

from server.engine.exact.cpu import CpuKernels
from server.engine.exact.kernels import Kernels

FREE_MEMORY_SHARE = 0.8  # what is free belongs to others too


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type == "cpu":
        return CpuKernels(dtype)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from server.engine.exact.cuda import TritonKernels

        return TritonKernels()
    return Kernels()


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(FREE_MEMORY_SHARE * psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_MEMORY_SHARE * (free + cached))
