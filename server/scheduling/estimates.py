"""Estimate how long work will take from recent work of the same model, direction and size.

Knows no devices and no requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..model_info import CoderId

FIRST_GUESS_S_PER_PIXEL = 1e-6
KEPT = 8  # the number of latest measurements that are kept for each size
FEWEST = 2  # the number of measurements that a lower bound needs, because the first one includes compilation
LASTS_S = 120.0  # older measurements give no lower bound, so that a wrong one cannot refuse work for ever

Measured = deque[tuple[float, float]]
"""Pairs of the time of a measurement, and the seconds that one pixel took."""


class Estimates:
    """Seconds per pixel of the latest work, by direction of a model and by size within a factor of four.

    Sizes are kept apart because small work has a fixed cost: its rate says nothing about large work.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start without measurements. clock: returns the time in seconds."""
        self._clock = clock
        self._measured: dict[CoderId, dict[int, Measured]] = {}

    def note(self, coder: CoderId, pixels: int, seconds: float) -> None:
        """Add a measurement. pixels, seconds: one request's share of a batch, and its time on the device."""
        sizes = self._measured.setdefault(coder, {})
        sizes.setdefault(_size_of(pixels), deque(maxlen=KEPT)).append((self._clock(), seconds / pixels))

    def seconds(self, coder: CoderId, pixels: int) -> float:
        """Estimate the usual time of a request on the device, in seconds.

        Uses the median rate of this size, or of the nearest size that was measured; without measurements, a guess.
        """
        sizes = self._measured.get(coder)
        if not sizes:
            return FIRST_GUESS_S_PER_PIXEL * pixels
        nearest = min(sizes, key=lambda size: abs(size - _size_of(pixels)))
        rates = sorted(rate for _, rate in sizes[nearest])
        return rates[(len(rates) - 1) // 2] * pixels  # the lower median: the first run is slow

    def least_seconds(self, coder: CoderId, pixels: int) -> float:
        """Estimate the least time of a request on the device, in seconds, by the fastest recent one of its size.

        Returns 0 if there are fewer than FEWEST measurements of this size, or if they are older than LASTS_S.
        """
        measured = self._measured.get(coder, {}).get(_size_of(pixels), deque())
        if len(measured) < FEWEST or measured[-1][0] < self._clock() - LASTS_S:
            return 0.0
        return min(rate for _, rate in measured) * pixels


def _size_of(pixels: int) -> int:
    return pixels.bit_length() // 2
