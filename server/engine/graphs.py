"""CUDA graphs of whole decodes and encodes: one launch replaces hundreds of kernel launches."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# How many graphs a coder keeps.
GRAPHS = 8
# Of how many keys a coder remembers that it has seen them once, or that recording failed.
REMEMBERED = 256
# The largest batch, in pixels, that is run as a graph. A larger one keeps the GPU busy without a graph, and a graph
# would hold the memory of its activations.
GRAPH_PIXELS = 1 << 20

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Launches the kernels that a graph records. It must not wait for the GPU."""

_all: WeakSet[Graphs] = WeakSet()


class Recording(Protocol):
    """A function that was recorded for inputs of one shape."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return new tensors with what the function returns for x."""
        ...


@dataclass(frozen=True)
class CudaRecording:
    """A recorded graph with the tensor it reads and the two tensors it writes, whose addresses never change."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Replay the graph for x."""
        self.input.copy_(x)
        self.graph.replay()
        first, second = self.outputs
        return first.clone(), second.clone()


class CudaRecorder:
    """Records graphs of one coder on one GPU.

    All graphs share one memory pool. That is safe because they run one after another, and the outputs of each are
    copied before the next one runs. held_bytes: the size of the pool, which no other tensor can use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all recordings, because a pool gives memory that was freed only to the stream that had it.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def record(self, function: Function, x: Tensor) -> Recording:
        """Record a function. Raises what torch raises if that fails; then nothing remains of it."""
        with torch.cuda.device(self.device):
            current, stream = torch.cuda.current_stream(), self._stream
            stream.wait_stream(current)
            try:
                # Run once without recording: this chooses algorithms and compiles kernels, which is impossible while
                # recording.
                with torch.cuda.stream(stream):
                    function(x)
                current.wait_stream(stream)
                torch.cuda.empty_cache()  # the graph allocates the memory of that run again, from its own pool
                graph, static, before = torch.cuda.CUDAGraph(), x.clone(), torch.cuda.memory_reserved()
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    outputs = function(static)
                self.held_bytes += torch.cuda.memory_reserved() - before
            finally:
                torch.cuda.set_stream(current)  # torch does not do so after a recording that failed
        return CudaRecording(graph, static, outputs)

    def forget(self) -> None:
        """Begin a new pool; the old one is freed with its graphs."""
        self.held_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()


class Recorder(Protocol):
    """Records functions on one device, as `CudaRecorder` does."""

    device: torch.device
    held_bytes: int

    def record(self, function: Function, x: Tensor) -> Recording:
        """Record a function for inputs of the shape of x."""
        ...

    def forget(self) -> None:
        """Free what all recordings share."""
        ...


class Graphs:
    """The recordings of one coder, by key.

    A key is recorded when it comes for the second time, because recording costs two runs. The least recently used
    recording is dropped when there are more than `limit`. A key whose recording failed is never recorded again.
    """

    def __init__(self, recorder: Recorder, limit: int = GRAPHS) -> None:
        self.recorder, self.limit = recorder, limit
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it may be recorded, by key
        _all.add(self)

    def __len__(self) -> int:
        """Return how many recordings are kept."""
        return len(self._recordings)

    def clear(self) -> None:
        """Drop all recordings, so that torch can free their memory."""
        self._recordings.clear()
        self.recorder.forget()

    def run(self, key: Hashable, function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `function(x)`, computed by a recording if there is one.

        key: must differ whenever `function` would launch other kernels, or the same kernels with other arguments.
        """
        recording = self._recordings.get(key) or self._recorded(key, function, x)
        if recording is None:
            return function(x)
        self._recordings.move_to_end(key)
        return recording(x)

    def _recorded(self, key: Hashable, function: Function, x: Tensor) -> Recording | None:
        """Record a key that was seen before, unless that failed then."""
        may_be_recorded = self._seen.get(key, False)
        self._note(key, self._seen.get(key, True))
        if not may_be_recorded:
            return None
        try:
            recording = self._recordings[key] = self.recorder.record(function, x)
        except Exception as error:  # noqa: BLE001  # whatever recording raises, the function still runs without it
            self._note(key, False)
            log.warning("a CUDA graph could not be recorded (%s); this size runs without one", error)
            return None
        if len(self._recordings) > self.limit:
            self._recordings.popitem(last=False)
        return recording

    def _note(self, key: Hashable, may_be_recorded: bool) -> None:
        self._seen[key] = may_be_recorded
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)


def graph_bytes(device: torch.device) -> int:
    """Return the memory that the recordings of all coders hold on a device."""
    return sum(graphs.recorder.held_bytes for graphs in list(_all) if graphs.recorder.device == device)


def clear_graphs(device: torch.device) -> None:
    """Drop the recordings of all coders on a device."""
    for graphs in list(_all):
        if graphs.recorder.device == device:
            graphs.clear()
