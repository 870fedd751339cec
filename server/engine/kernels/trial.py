"""Which form of a convolution over frames a device runs faster: tried once in a process for each device and dtype."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import torch

from .reference import TAPS, Kernels

log = logging.getLogger(__name__)

# A layer of usual size: a window of frames, rows and columns, and its channels.
FRAMES, ROWS, COLUMNS, CHANNELS = 6, 18, 416, 96
CLEARLY = 0.95  # the 3-D form is chosen if it takes less than this share of the time of the 2-D form

_found: dict[tuple[str, torch.dtype], bool] = {}


def is_faster_in_3d(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a 3-D convolution is clearly faster than a 2-D one over three frames side by side.

    kernels: those of the device, which are tried in both forms and left in 2-D; the caller sets `in_3d` before any
    weight is packed. The answer is kept for the process.
    """
    key = str(device), dtype
    if key not in _found:
        _found[key] = _tried(kernels, device, dtype)
        log.debug("%s in %s convolves frames %s", device, dtype, "in 3-D" if _found[key] else "side by side")
    return _found[key]


@torch.inference_mode()
def _tried(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    weight = torch.zeros(CHANNELS, CHANNELS, TAPS, 3, 3, dtype=dtype, device=device)  # [O, I, 3, 3, 3]
    window = weight.new_zeros(FRAMES, ROWS, COLUMNS, CHANNELS)  # [n, r, W, I]
    bias = weight.new_zeros(CHANNELS)  # [O]
    best = {True: math.inf, False: math.inf}
    for in_3d in (True, False) * 2:
        kernels.in_3d = in_3d
        packed = kernels.pack_frames(weight)
        best[in_3d] = min(best[in_3d], seconds(partial(kernels.conv_frames, window, packed, bias, 1), device))
    kernels.in_3d = False
    return best[True] < CLEARLY * best[False]


def seconds(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the shortest of three runs of a call, in seconds. device: waited for after each run if it is a GPU."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
