"""How long work will take, from how long the like of it took. Seconds grow with the pixels of all images and frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.types import Half

FIRST_GUESS_S_PER_PIXEL = 1e-6
SMALL_PIXELS = 256 * 256  # below, a decode costs what it costs at any size
WEIGHT_OF_LATEST = 0.3  # in the moving average
KEPT = 8  # measurements of which the fastest bounds how long work takes at least
FEWEST = 2  # measurements that such a bound needs: the first one contains compilations
LASTS_S = 120.0  # after so long without a measurement the bound is forgotten, so that it cannot refuse work for ever


@dataclass
class Rates:
    """Seconds per pixel of one direction of a model."""

    average: float
    latest: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """When each was measured, and what."""


class Estimates:
    """One moving average for each direction of each model."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rates: dict[Half, Rates] = {}

    def note(self, half: Half, pixels: int, seconds: float) -> None:
        """Learn from work that took so long on the device. pixels, seconds: of one request's share of a batch."""
        rate = seconds / max(pixels, SMALL_PIXELS)
        rates = self._rates.setdefault(half, Rates(rate))
        rates.average = (1 - WEIGHT_OF_LATEST) * rates.average + WEIGHT_OF_LATEST * rate
        rates.latest.append((self._clock(), rate))

    def seconds(self, half: Half, pixels: int) -> float:
        """Return how long it usually takes; a guess while nothing was measured."""
        rates = self._rates.get(half)
        return max(pixels, SMALL_PIXELS) * (rates.average if rates else FIRST_GUESS_S_PER_PIXEL)

    def least_seconds(self, half: Half, pixels: int) -> float:
        """Return how long it takes at least, 0 while too little was measured lately to say so."""
        rates = self._rates.get(half)
        if rates is None or len(rates.latest) < FEWEST or rates.latest[-1][0] < self._clock() - LASTS_S:
            return 0.0
        return max(pixels, SMALL_PIXELS) * min(rate for _, rate in rates.latest)
