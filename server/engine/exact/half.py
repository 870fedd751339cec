"""What the exact decoder and the exact encoder of an AutoencoderKL share: kernels, a plan within the memory, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from server.engine.exact.graphs import GRAPHS, Graphs
from server.engine.exact.kernels import Kernels
from server.engine.exact.memory import free_bytes, kernels_for
from server.engine.exact.plan import Network, Plan, fit, footprint, wanted

N = TypeVar("N", bound=Network)


class ExactHalf(Generic[N]):
    """Takes over the weights of its half of the VAE, which are on their device already, in the dtype to compute in.

    memory_budget_bytes: bounds the activations' peak; None takes it from the memory that is free at each run.
    """

    name = "exact"

    def __init__(self, weight: Tensor, take: Callable[[Kernels], N], memory_budget_bytes: int | None) -> None:
        """weight: one of them. take: makes the network of the VAE."""
        self.memory_budget_bytes = memory_budget_bytes
        self.kernels = kernels_for(weight.device, weight.dtype)
        self.network = take(self.kernels)
        self.graphs = Graphs(GRAPHS) if weight.device.type == "cuda" else None
        self.finite = torch.ones((), dtype=torch.bool)

    def plan(self, batch: int, height: int, width: int) -> Plan:
        """For inputs of height x width."""
        need = footprint(self.network, height, width)
        budget = self.memory_budget_bytes
        free = free_bytes(self.network.device) if budget is None else budget
        return fit(need, wanted(need, batch, self.network), free)

    def peak_bytes(self, batch: int, height: int, width: int) -> int:
        """An estimate of the activations' peak for inputs of height x width, without a run."""
        return footprint(self.network, height, width).peak(self.plan(batch, height, width))
