"""The common part of the exact decoder and encoder of an AutoencoderKL: kernels, plans and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from ....model_info import EXACT
from ...graphs import CudaRecorder, Graphs
from ...kernels.choice import kernels_for
from ...kernels.reference import Kernels
from ...memory import free_bytes
from .plan import LayeredWeights, Plan, fit, footprint, wanted

N = TypeVar("N", bound=LayeredWeights)


class ExactCoder(Generic[N]):
    """The weights of one direction of a VAE, with the kernels that run them on their device in their dtype."""

    name = EXACT
    heeds_budget = True

    def __init__(self, weight: Tensor, take: Callable[[Kernels], N]) -> None:
        """Choose the kernels and take the weights.

        weight: any weight of the VAE; its device and dtype are those to compute on.
        take: takes the weights out of the VAE, packed for the given kernels.
        """
        self.kernels = kernels_for(weight.device, weight.dtype)
        self.network = take(self.kernels)
        self.graphs = Graphs(CudaRecorder(weight.device)) if weight.device.type == "cuda" else None

    def free_caches(self) -> None:
        """Free the memory of the recorded CUDA graphs."""
        if self.graphs is not None:
            self.graphs.clear()

    def plan(self, batch: int, height: int, width: int, budget_bytes: int | None = None) -> Plan:
        """Plan a run for inputs of height x width.

        budget_bytes: the memory limit of the activations; None means the memory that is free now.
        """
        need = footprint(self.network, height, width)
        free = free_bytes(self.network.device) if budget_bytes is None else budget_bytes
        return fit(need, wanted(need, batch, self.network), free)

    def peak_bytes(self, batch: int, height: int, width: int, budget_bytes: int | None = None) -> int:
        """Estimate the peak memory of the activations for inputs of height x width, without a run."""
        return footprint(self.network, height, width).peak(self.plan(batch, height, width, budget_bytes))
