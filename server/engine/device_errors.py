"""What the errors of a device mean. CUDA's libraries tell them apart only by their texts."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

# Words in the errors of torch's CPU allocator, oneDNN, cuBLAS, cuDNN and Triton. cuDNN finds no engine when it gets no
# memory to work in; oneDNN, cuBLAS and cuDNN cannot begin when their own memory cannot be allocated.
NO_MEMORY = re.compile(
    "allocate memory|out of memory|alloc_failed|unable to find an engine to execute"
    "|could not create a primitive(?! descriptor)"  # without a descriptor, oneDNN does not support the operation
    "|cublas_status_not_initialized|cudnn_status_not_initialized"
)
# Words in errors after which every later call of the process fails too.
LOST = re.compile(r"cuda error|triton error \[cuda\]|cudnn_status_execution_failed|cublas_status_execution_failed")

# Words in errors of CUDA that say that one call was wrong or impossible here. The next call may succeed.
OF_ONE_CALL = re.compile(
    "no kernel image is available|invalid argument|invalid configuration|invalid device function|not supported"
    "|cublas_status_not_supported|cublas_status_invalid_value|cudnn_status_not_supported|cudnn_status_bad_param"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _has(error, NO_MEMORY)


def is_lost_device(error: BaseException | None) -> bool:
    """Return whether it is an error of CUDA after which every later call of this process fails too."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error) or _has(error, OF_ONE_CALL):
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or _has(error, LOST)


def _has(error: BaseException, words: re.Pattern[str]) -> bool:
    return words.search(str(error).lower()) is not None


def where(error: BaseException) -> str:
    """Describe an unexpected error in one line: its class, its first line, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    first_line = next(iter(str(error).strip().splitlines()), "")[:300]
    return f"{type(error).__name__}{place}: {first_line}" if first_line else f"{type(error).__name__}{place}"
