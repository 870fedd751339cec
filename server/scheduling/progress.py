"""How far a request is, for clients that watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .engines import Pending

MOST_PROGRESS = 0.99  # until the answer is there


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    state: whether a device has begun with it.
    position: how many requests are before it in the queue; 0 once a device has begun.
    progress: the share of the work that is done, 0 to 1: of the frames of a video, else an estimate from the time.
    seconds_left: the estimated time until the answer is there; None if it cannot be estimated.
    """

    state: Literal["queued", "running"]
    position: int
    progress: float
    seconds_left: float | None


def progress_of(pending: Pending, position: int, seconds_before: float, now: float) -> Progress:
    """Return how far a request is.

    position, seconds_before: the requests before it in the queue, and the time that they will take. now: the time of
    the event loop.
    """
    if pending.started is None:
        return Progress("queued", position, 0.0, seconds_before + pending.seconds)
    elapsed = now - pending.started
    frames = pending.request.job.geometry.num_frames
    if pending.frames_done and frames:
        share = min(MOST_PROGRESS, pending.frames_done / frames)
        return Progress("running", 0, share, elapsed * (1 - share) / share)
    share = min(MOST_PROGRESS, elapsed / pending.seconds) if pending.seconds else 0.0
    return Progress("running", 0, share, max(0.0, pending.seconds - elapsed) if share < MOST_PROGRESS else None)
