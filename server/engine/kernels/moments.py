"""GroupNorm of an activation in bands: the statistics of its parts are merged into one scale and shift per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Per-channel statistics of K disjoint parts of an activation, in float32. m2: the sum of squared deviations."""

    count: Tensor  # [K] pixels in each part
    mean: Tensor  # [K, B, C]
    m2: Tensor  # [K, B, C]


@dataclass(frozen=True)
class Affine:
    """The map y = scale * x + shift. A norm is such a map once its statistics are known."""

    scale: Tensor  # [B, C] float32
    shift: Tensor  # [B, C] float32


@dataclass(frozen=True)
class GroupNorm:
    """The parameters of a GroupNorm layer."""

    groups: int
    eps: float
    weight: Tensor  # [C] float32
    bias: Tensor  # [C] float32

    def affine(self, parts: Sequence[Moments], offset: Tensor | None = None) -> Affine:
        """Return the norm of x + offset as an affine map of x.

        parts: the moments of x. offset: the bias `[C]` of a convolution, if it was not added to x.

        Count, mean and M2 are merged as in Chan, Golub, LeVeque (1979). This never subtracts two large sums, which
        E[x²] - E[x]² would do.
        """
        count = torch.cat([part.count for part in parts])  # [K]
        mean = torch.cat([part.mean for part in parts])  # [K, B, C]
        m2 = torch.cat([part.m2 for part in parts])  # [K, B, C]
        if offset is not None:
            offset = offset.float()  # [C]
            mean = mean + offset  # [K, B, C]

        grouped = (*mean.shape[:2], self.groups, -1)
        n = count.view(-1, 1, 1, 1)  # [K, 1, 1, 1]
        mean, m2 = mean.view(grouped), m2.view(grouped)  # [K, B, G, C/G]
        total = count.sum() * mean.shape[-1]  # pixels times channels of a group
        rough = (n * mean).sum((0, 3), keepdim=True) / total  # [1, B, G, 1]
        # The sum of what differs from it is smaller, and rounded less.
        centre = rough + (n * (mean - rough)).sum((0, 3), keepdim=True) / total  # [1, B, G, 1]
        variance = (m2 + n * (mean - centre).square()).sum((0, 3), keepdim=True) / total  # [1, B, G, 1]
        rstd = torch.rsqrt(variance + self.eps)  # [1, B, G, 1]

        weight = self.weight.view(self.groups, -1)  # [G, C/G]
        scale = (weight * rstd[0]).flatten(1)  # [B, C]
        shift = self.bias - (weight * (rstd * centre)[0]).flatten(1)  # [B, C]
        if offset is not None:
            shift = shift + scale * offset  # [B, C]
        return Affine(scale, shift)
