"""Remember which models failed to load, and when the next attempt may begin. Nothing else remembers that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import ModelUnavailable
from ..model_info import CoderId


class LoadFailures:
    """The load failures by device and coder."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start without failures. clock: returns the time in seconds."""
        self._clock = clock
        self._failures: dict[tuple[object, CoderId], tuple[float, ModelUnavailable]] = {}

    def note(self, device: object, coder: CoderId, error: ModelUnavailable) -> None:
        """Remember for `error.retry_after_s` that this coder did not load on this device."""
        self._failures[device, coder] = self._clock() + (error.retry_after_s or 0), error

    def find(self, devices: Iterable[object], coder: CoderId) -> ModelUnavailable | None:
        """Return the failure of a coder if it failed on all of these devices; None if one of them may try to load it.

        The `retry_after_s` of the failure is the time until the first device may try again, at least 1 s.
        """
        now = self._clock()
        found = [self._failures.get((device, coder), (0.0, None)) for device in devices]
        until, error = min(found, key=lambda failure: failure[0], default=(0.0, None))
        if error is None or until <= now:
            return None
        # A new one: each time that the same exception is raised, its traceback grows.
        return ModelUnavailable(error.model, error.detail, retry_after_s=max(1, round(until - now)))
