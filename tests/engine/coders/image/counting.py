"""How much memory a run holds at once, counted and not measured."""

from __future__ import annotations

import weakref

from torch import Tensor

from server.engine.kernels.moments import Moments
from server.engine.kernels.reference import Kernels


class CountingKernels(Kernels):
    """Knows the most bytes of convolutions' outputs that were alive at once."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: int = 1, stride: int = 1) -> Tensor:
        return self.count(super().conv(x, weight, bias, columns, stride))

    def interleave(self, phases: Tensor, bias: Tensor, unit: int) -> tuple[Tensor, Moments]:
        image, moments = super().interleave(phases, bias, unit)
        return self.count(image), moments

    def count(self, made: Tensor) -> Tensor:
        storage = made.untyped_storage()
        self.alive += storage.nbytes()
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, storage.nbytes())
        return made

    def forget(self, size: int) -> None:
        self.alive -= size
