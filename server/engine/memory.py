"""How much memory a device has free."""

from __future__ import annotations

import psutil
import torch

FREE_MEMORY_SHARE = 0.8  # other processes need some of the free memory too


def free_bytes(device: torch.device) -> int:
    """Return how many bytes a run may plan to use on a device: a share of what is free, or cached by torch."""
    if device.type != "cuda":
        return int(FREE_MEMORY_SHARE * psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_MEMORY_SHARE * (free + cached))
