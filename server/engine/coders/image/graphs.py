"""CUDA graphs of whole runs: hundreds of kernel launches become one. The least recently used are dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPHS = 8
GRAPH_PIXELS = 1 << 20  # above this a run keeps the GPU busy by itself, and a graph would only hold its memory


@dataclass(frozen=True)
class Recording:
    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: tuple[Tensor, Tensor]


class Graphs:
    """One pool of memory serves all graphs: they run one after another, each output copied out before the next."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recordings)

    def clear(self) -> None:
        self._recordings.clear()

    def run(
        self, key: Hashable, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
    ) -> tuple[Tensor, Tensor]:
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
        with torch.cuda.stream(stream):  # the first run picks algorithms and compiles kernels, which a recording cannot
            function(x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        torch.cuda.empty_cache()  # what that run took is wanted again by the graphs' own pool
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function(static)
        return Recording(graph, static, outputs)
