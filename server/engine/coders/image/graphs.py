"""CUDA graphs of whole decodes and encodes: one launch replaces hundreds of kernel launches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

# How many graphs a coder keeps.
GRAPHS = 8
# The largest batch, in pixels, that is run as a graph. A larger one keeps the GPU busy without a graph, and a graph
# would hold the memory of its activations.
GRAPH_PIXELS = 1 << 20


@dataclass(frozen=True)
class Recording:
    """A recorded graph with the tensor it reads and the two tensors it writes, whose addresses never change."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: tuple[Tensor, Tensor]


class Graphs:
    """CUDA graphs by key. The least recently used one is dropped when there are more than `limit`.

    All graphs share one memory pool. That is safe because they run one after another, and the outputs of each are
    copied before the next one runs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()

    def __len__(self) -> int:
        """Return how many graphs are kept."""
        return len(self._recordings)

    def clear(self) -> None:
        """Drop all graphs, so that torch can free their memory."""
        self._recordings.clear()

    def run(
        self, key: Hashable, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `function(x)`, computed by replaying a graph. The first call with a key records the graph.

        key: must differ whenever `function` would launch other kernels, or the same kernels with other arguments.
        function: launches the kernels that are recorded. It must not wait for the GPU.
        """
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(function, x)
            if len(self._recordings) > self.limit:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording.input.copy_(x)
        recording.graph.replay()
        first, second = recording.outputs
        return first.clone(), second.clone()

    def _record(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Recording:
        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(x.device))
        # Run once without recording: this chooses algorithms and compiles kernels, which is impossible while recording.
        with torch.cuda.stream(stream):
            function(x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        torch.cuda.empty_cache()  # free the memory of that run: the graph allocates as much again from its own pool
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function(static)
        return Recording(graph, static, outputs)
