"""Estimate how long work will take from recent work of the same model, direction and size.

Knows no devices and no requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..model_info import CoderId

FIRST_GUESS_S_PER_PIXEL = 1e-6
KEPT = 8  # measurements of each size
FEWEST = 2  # measurements that a lower bound needs: the first one contains compilations
LASTS_S = 120.0  # older measurements refuse no work, so that a wrong one cannot refuse it for ever

Measured = deque[tuple[float, float]]
"""When it was measured, and how many seconds a pixel took."""


class Estimates:
    """Seconds per pixel of the latest work, by direction of a model and by size within a factor of four.

    Sizes are kept apart because small work has a fixed cost: its rate says nothing about large work.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._measured: dict[CoderId, dict[int, Measured]] = {}

    def note(self, coder: CoderId, pixels: int, seconds: float) -> None:
        """Learn from work that took so long on the device. pixels, seconds: one request's share of its batch."""
        sizes = self._measured.setdefault(coder, {})
        sizes.setdefault(_size_of(pixels), deque(maxlen=KEPT)).append((self._clock(), seconds / pixels))

    def seconds(self, coder: CoderId, pixels: int) -> float:
        """Return how long it usually takes: by the median of this size or the nearest one, else a guess."""
        sizes = self._measured.get(coder)
        if not sizes:
            return FIRST_GUESS_S_PER_PIXEL * pixels
        nearest = min(sizes, key=lambda size: abs(size - _size_of(pixels)))
        rates = sorted(rate for _, rate in sizes[nearest])
        return rates[(len(rates) - 1) // 2] * pixels  # the lower median: the first run is slow

    def least_seconds(self, coder: CoderId, pixels: int) -> float:
        """Return how long the fastest of the latest like it would take; 0 while too little was measured to say so."""
        measured = self._measured.get(coder, {}).get(_size_of(pixels), deque())
        if len(measured) < FEWEST or measured[-1][0] < self._clock() - LASTS_S:
            return 0.0
        return min(rate for _, rate in measured) * pixels


def _size_of(pixels: int) -> int:
    return pixels.bit_length() // 2
