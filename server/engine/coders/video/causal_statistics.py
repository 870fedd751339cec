"""The statistics of GroupNorms that span a frame, a chunk of frames or the whole video.

A chunk that is whole, with all its rows, has the statistics of its frames and of itself. Those of the whole video, and
those of chunks that are computed in slabs of rows, must be collected before the layer after them can run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ...kernels.moments import Affine, Moments
from ...kernels.reference import Kernels
from .causal_layers import Span, SpanNorm


@dataclass(frozen=True)
class Place:
    """Where a chunk is in its video.

    number: counts the chunks.
    is_single: the chunk's first frame is the first of the video and is not doubled or halved in time.
    latents: the chunk's latents `[F, h, w, Z]`, for norms of decoders that are scaled by them; None in an encoder.
    """

    number: int
    is_single: bool
    latents: Tensor | None = None


class Statistics:
    """What is known of one video's norms."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.known: dict[tuple[int, Hashable], Affine] = {}  # by norm and span
        self.collected: dict[Hashable, list[Moments]] = defaultdict(list)  # by span, of one norm

    def affines(self, norm: SpanNorm, place: Place, x: Tensor) -> list[Affine]:  # [n, H, W, C]
        """Return the norm as one affine map for each frame of a chunk.

        x: the norm's input. If nothing was collected, x must have all rows of the chunk, and the norm must not span the
        whole video.
        """
        spans = [_span(norm, place, frame) for frame in range(len(x))]
        if (id(norm), spans[0]) in self.known:
            return [self.known[id(norm), span] for span in spans]
        assert norm.span is not Span.VIDEO
        found = [self._moments(frame) for frame in x]
        if norm.span is Span.CHUNK:
            return [self.kernels.affine(norm.norm, found)] * len(x)
        return [self.kernels.affine(norm.norm, [moments]) for moments in found]

    def collect(self, norm: SpanNorm, place: Place, x: Tensor) -> None:  # [n, rows, W, C]
        """Note the statistics of some rows of a chunk."""
        for frame, rows in enumerate(x):
            self.collected[_span(norm, place, frame)].append(self._moments(rows))

    def settle(self, norm: SpanNorm) -> None:
        """Turn what was collected into the norm's affine maps, and forget it."""
        for span, parts in self.collected.items():
            self.known[id(norm), span] = self.kernels.affine(norm.norm, parts)
        self.collected.clear()

    def _moments(self, frame: Tensor) -> Moments:  # [rows, W, C]
        """Return the statistics of one frame, so that they do not depend on the length of a chunk."""
        return self.kernels.moments(frame[None], len(frame))


def _span(norm: SpanNorm, place: Place, frame: int) -> Hashable:
    match norm.span:
        case Span.FRAME:
            return place.number, frame
        case Span.CHUNK:
            return place.number
        case Span.VIDEO:
            return None
