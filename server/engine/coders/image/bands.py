"""Activations as row bands: either stored until the next layer has read them, or recomputed at every read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...kernels.moments import Moments

Span = tuple[int, int]
"""The rows [top, bottom) of an activation."""


def spans(height: int, rows: int) -> list[Span]:
    """Cut [0, height) into spans of `rows`; the last one may be shorter."""
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Bands:
    """An activation stored as row bands `[B, rows, W, C]`, from top to bottom.

    unit: how many rows share one set of statistics (`Plan.unit_rows`).
    spans: the rows of each band.
    moments: the statistics of all bands, for the norm that reads them next.
    """

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.spans: list[Span] = []
        self.moments: list[Moments] = []
        self._bands: list[Tensor | None] = []

    @property
    def height(self) -> int:
        """The number of rows appended so far."""
        return self.spans[-1][1] if self.spans else 0

    def append(self, band: Tensor, moments: Moments | None = None) -> None:  # [B, rows, W, C]
        """Add a band below the others. moments: its statistics; None if no norm will read them."""
        if moments is not None:
            self.moments.append(moments)
        self.spans.append((self.height, self.height + band.shape[1]))
        self._bands.append(band)

    def rows(self, top: int, bottom: int) -> Iterator[Tensor]:
        """Yield views that together cover the rows [top, bottom); rows outside the activation are left out.

        Each view is `[B, some rows, W, C]`. Raises AssertionError if one of the rows was released.
        """
        for (start, stop), band in zip(self.spans, self._bands, strict=True):
            first, last = max(top, start), min(bottom, stop)
            if first < last:
                assert band is not None, "rows were read after they were released"
                yield band[:, first - start : last - start]

    def band(self, index: int) -> Tensor:
        """Return the band `[B, rows, W, C]` at this index. Raises AssertionError if it was released."""
        band = self._bands[index]
        assert band is not None, "a band was read after it was released"
        return band

    def whole(self) -> Tensor:
        """Return the activation as one tensor `[B, H, W, C]`. The bands become views of it, so it is stored once."""
        if len(self.spans) == 1:
            return self.band(0)
        whole = torch.cat([self.band(i) for i in range(len(self.spans))], dim=1)  # [B, H, W, C]
        self._bands = [whole[:, top:bottom] for top, bottom in self.spans]
        return whole

    def release_above(self, row: int) -> None:
        """Free every band that ends at or above `row`."""
        for index, (_, stop) in enumerate(self.spans):
            if stop <= row:
                self._bands[index] = None


class Recomputed:
    """An activation that is not stored: every read computes its rows from another activation.

    It has the attributes of `Bands` that a layer reads: unit, spans, moments, height, rows and release_above.
    """

    def __init__(
        self, unit: int, spans: list[Span], make: Callable[[int, int], Tensor], release: Callable[[int], None]
    ) -> None:
        """Describe how to compute the rows.

        make: computes the rows [top, bottom) as `[B, n, W, C]`.
        release: called with a row; frees the inputs that only rows above it are computed from.
        """
        self.unit = unit
        self.spans = spans
        self.moments: list[Moments] = []
        self.height = spans[-1][1]
        self._make = make
        self.release_above = release

    def rows(self, top: int, bottom: int) -> Iterator[Tensor]:
        """Compute the rows [top, bottom) and yield them as one tensor; rows outside the activation are left out."""
        yield self._make(max(top, 0), min(bottom, self.height))


Activation = Bands | Recomputed
"""The input of a layer, stored or recomputed."""
