"""Which models failed to load, and until when nobody tries again. The only memory of that fact."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import ModelUnavailable
from ..model_info import CoderId


class LoadFailures:
    """Load failures by device and direction. Times are seconds of the clock that is given."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[tuple[object, CoderId], tuple[float, ModelUnavailable]] = {}

    def note(self, device: object, coder: CoderId, error: ModelUnavailable) -> None:
        """Remember that this direction did not load on this device, for as long as the error says."""
        self._failures[device, coder] = self._clock() + (error.retry_after_s or 0), error

    def find(self, devices: Iterable[object], coder: CoderId) -> ModelUnavailable | None:
        """Return the failure of a direction that failed on every one of these devices, None if one may still load it.

        Its `retry_after_s` is what is left until the first of them tries again, at least 1 s.
        """
        now = self._clock()
        found = [self._failures.get((device, coder), (0.0, None)) for device in devices]
        until, error = min(found, key=lambda failure: failure[0], default=(0.0, None))
        if error is None or until <= now:
            return None
        # A new one: each time that the same exception is raised, its traceback grows.
        return ModelUnavailable(error.model, error.detail, retry_after_s=max(1, round(until - now)))
