"""A whole activation as row bands: kept until the next layer has consumed them, or computed whenever they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...kernels.moments import Moments

Span = tuple[int, int]


def spans(height: int, rows: int) -> list[Span]:
    """[0, height) cut into bands of `rows`, the last one shorter."""
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Picture:
    """Row bands `[B, rows, W, C]`, top to bottom, with the moments of each for the norm that reads them."""

    def __init__(self, unit: int) -> None:
        self.unit = unit  # rows whose statistics are taken together
        self.spans: list[Span] = []
        self.moments: list[Moments] = []
        self._bands: list[Tensor | None] = []

    @property
    def height(self) -> int:
        return self.spans[-1][1] if self.spans else 0

    def append(self, band: Tensor, moments: Moments | None = None) -> None:  # [B, rows, W, C]
        if moments is not None:
            self.moments.append(moments)
        self.spans.append((self.height, self.height + band.shape[1]))
        self._bands.append(band)

    def rows(self, top: int, bottom: int) -> Iterator[Tensor]:
        """Views that together are rows [top, bottom), clipped to the picture; each `[B, some rows, W, C]`."""
        for (start, stop), band in zip(self.spans, self._bands, strict=True):
            first, last = max(top, start), min(bottom, stop)
            if first < last:
                assert band is not None, "rows were read after they were released"
                yield band[:, first - start : last - start]

    def band(self, index: int) -> Tensor:
        band = self._bands[index]
        assert band is not None, "a band was read after it was released"
        return band

    def whole(self) -> Tensor:
        """One tensor, and the bands become views of it."""
        if len(self.spans) == 1:
            return self.band(0)
        whole = torch.cat([self.band(i) for i in range(len(self.spans))], dim=1)  # [B, H, W, C]
        self._bands = [whole[:, top:bottom] for top, bottom in self.spans]
        return whole

    def release_above(self, row: int) -> None:
        """Free every band that lies wholly above `row`."""
        for index, (_, stop) in enumerate(self.spans):
            if stop <= row:
                self._bands[index] = None


class Recomputed:
    """A picture of which nothing is kept: its rows are computed from another one every time they are read."""

    def __init__(
        self, unit: int, spans: list[Span], make: Callable[[int, int], Tensor], release: Callable[[int], None]
    ) -> None:
        """make: rows [top, bottom), `[B, n, W, C]`. release: frees what only rows above the given one are made of."""
        self.unit = unit
        self.spans = spans
        self.moments: list[Moments] = []
        self.height = spans[-1][1]
        self._make = make
        self.release_above = release

    def rows(self, top: int, bottom: int) -> Iterator[Tensor]:
        yield self._make(max(top, 0), min(bottom, self.height))


Rows = Picture | Recomputed
