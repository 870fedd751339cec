"""The common part of the exact decoder and encoder of an AutoencoderKL: kernels, plans and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ....model_info import EXACT
from ...graphs import GRAPH_PIXELS, CudaRecorder, Graphs
from ...kernels.choice import kernels_for
from ...kernels.reference import Kernels
from ...memory import free_bytes
from ..interface import Check, go_on
from .plan import LayeredWeights, Plan, fit, footprint, wanted

N = TypeVar("N", bound=LayeredWeights)


class Run(Protocol):
    """Runs one direction as planned."""

    def __call__(self, plan: Plan, x: Tensor, /, check: Check) -> tuple[Tensor, Tensor]:
        """Return the output for x, and whether it is finite, a tensor with one bool."""
        ...


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

    def plan(self, batch: int, height: int, width: int, budget_bytes: int | None = None, own_bytes: int = 0) -> Plan:
        """Plan a run for inputs of height x width.

        budget_bytes: the memory limit of the activations; None means the memory that is free now.
        own_bytes: the memory that CUDA graphs hold and that this run may use again.
        """
        need = footprint(self.network, height, width)
        free = free_bytes(self.network.device, own_bytes) if budget_bytes is None else budget_bytes
        return fit(need, wanted(need, batch, self.network), free)

    def compute(
        self, run: Run, x: Tensor, pixels: int, budget_bytes: int | None, check: Check, *key: Hashable
    ) -> tuple[Tensor, Tensor]:  # [B, C, h, w] of latents or pixels
        """Run with a plan that fits the memory, by a CUDA graph if the images are small.

        pixels: the number of pixels of all images together. key: what else `run` depends on.
        """
        size = x.shape[0], x.shape[2], x.shape[3]  # B, h, w
        plan = self.plan(*size, budget_bytes)
        if self.graphs is None or pixels > GRAPH_PIXELS:
            return run(plan, x, check)
        # A recording runs in memory that the recordings hold already. Without that memory the plan may be a slower one.
        with_graph_memory = self.plan(*size, budget_bytes, self.graphs.recorder.held_bytes)
        if self.graphs.has((x.shape, *key, with_graph_memory)):
            plan = with_graph_memory
        # `check` must not raise while a graph is recorded, and nothing in Python runs while it is replayed.
        return self.graphs.run((x.shape, *key, plan), partial(run, plan, check=go_on), x)

    def peak_bytes(self, batch: int, height: int, width: int, budget_bytes: int | None = None) -> int:
        """Estimate the peak memory of the activations for inputs of height x width, without a run."""
        return footprint(self.network, height, width).peak(self.plan(batch, height, width, budget_bytes))
