"""How much memory a device has free."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from .graphs import graph_bytes

FREE_MEMORY_SHARE = 0.8  # other processes need some of the free memory too
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, own_bytes: int = 0) -> int:
    """Return how many bytes a run may plan to use on a device: a share of what is free, or cached by torch.

    own_bytes: the memory that CUDA graphs hold and that this run may use again.
    """
    if device.type != "cuda":
        return int(FREE_MEMORY_SHARE * min(psutil.virtual_memory().available, container_bytes()))
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # The memory of CUDA graphs counts as cached, but no other tensor can use it.
    return int(FREE_MEMORY_SHARE * (free + max(0, cached - graph_bytes(device) + own_bytes)))


def container_bytes(root: Path = CGROUP) -> float:
    """Return how many bytes this container may still use; infinity without a limit. root: its control group.

    File pages that are inactive count as free, because the kernel reclaims them before it ends a process.
    """
    try:
        limit = float((root / "memory.max").read_text().replace("max", "inf"))
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return float("inf")
    return max(0, limit - used + reclaimable)
