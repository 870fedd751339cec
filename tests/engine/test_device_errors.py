"""The errors of CUDA's libraries, as they word them."""

from __future__ import annotations

import pytest
import torch

from server.engine.device_errors import is_lost_device, is_out_of_memory

SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("could not create a primitive"),  # oneDNN
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
LOST = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
]
NEITHER = [
    RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("CUDA error in a name"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
    RuntimeError("Triton Error [CUDA]: invalid device function"),
    None,
]


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=str)
def test_these_mean_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_lost_device(error)


@pytest.mark.parametrize("error", LOST, ids=str)
def test_these_mean_that_the_device_is_lost(error: Exception) -> None:
    assert is_lost_device(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_these_mean_neither(error: Exception | None) -> None:
    assert not is_lost_device(error)
    assert error is None or not is_out_of_memory(error)
