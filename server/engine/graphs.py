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
# Of how many keys a coder remembers when it saw them, or that recording failed.
REMEMBERED = 256
FAILED = -1
# The largest batch, in pixels, that is run as a graph. A larger one keeps the GPU busy without a graph, and a graph
# would hold the memory of its activations.
GRAPH_PIXELS = 1 << 20

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Launches the kernels that a graph records. It must not wait for the GPU.

It takes one tensor of any shape and returns two: the result, and whether all of its values are finite, one bool [].
"""

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
        """Record a function.

        Raises what torch raises if that fails. Memory that was allocated before the failure stays in the pool until
        `forget`.
        """
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
                try:
                    with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                        outputs = function(static)
                finally:
                    self.held_bytes += torch.cuda.memory_reserved() - before
            finally:
                torch.cuda.set_stream(current)  # torch does not do so after a recording that failed
        return CudaRecording(graph, static, outputs)

    def forget(self) -> None:
        """Begin a new pool; the old one is freed with its graphs."""
        self.held_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()


class Recorder(Protocol):
    """Records functions on one device, as `CudaRecorder` does.

    held_bytes: the memory that is reserved for its recordings.
    """

    device: torch.device
    held_bytes: int

    def record(self, function: Function, x: Tensor) -> Recording:
        """Record a function for inputs of the shape and dtype of x. Raises what torch raises if that fails."""
        ...

    def forget(self) -> None:
        """Free what all recordings share."""
        ...


class Graphs:
    """The recordings of one coder, by key.

    A key is recorded when it comes for the second time, because recording costs two runs. If there are `limit`
    recordings already, then the least recently used one is dropped for it, but only if that one was not used since the
    key came before: otherwise a few more keys in rotation than `limit` would each be recorded at every call. A key
    whose recording failed is never recorded again.
    """

    def __init__(self, recorder: Recorder, limit: int = GRAPHS) -> None:
        self.recorder, self.limit = recorder, limit
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()  # the least recently used one first
        self._calls = 0
        self._used: dict[Hashable, int] = {}  # the number of the last call with each recording
        self._seen: OrderedDict[Hashable, int] = OrderedDict()  # of the last call without one, or FAILED, by key
        _all.add(self)

    def __len__(self) -> int:
        """Return how many recordings are kept."""
        return len(self._recordings)

    def has(self, key: Hashable) -> bool:
        """Return whether a recording of this key is kept."""
        return key in self._recordings

    def clear(self) -> None:
        """Drop all recordings, so that torch can free their memory."""
        self._recordings.clear()
        self._used.clear()
        self.recorder.forget()

    def run(self, key: Hashable, function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `function(x)`, computed by a recording if there is one.

        key: must differ whenever `function` would launch other kernels, or the same kernels with other arguments.
        """
        self._calls += 1
        recording = self._recordings.get(key) or self._recorded(key, function, x)
        if recording is None:
            return function(x)
        self._recordings.move_to_end(key)
        self._used[key] = self._calls
        return recording(x)

    def _recorded(self, key: Hashable, function: Function, x: Tensor) -> Recording | None:
        """Record a key that was seen before, unless that failed then or other recordings are needed more."""
        before = self._seen.get(key)
        self._note(key, FAILED if before == FAILED else self._calls)
        if before is None or before == FAILED:
            return None
        oldest = next(iter(self._recordings), None) if len(self._recordings) >= self.limit else None
        if oldest is not None:
            if self._used[oldest] > before:
                return None
            del self._recordings[oldest], self._used[oldest]
        try:
            recording = self._recordings[key] = self.recorder.record(function, x)
        except Exception as error:  # noqa: BLE001  # whatever recording raises, the function still runs without it
            self._note(key, FAILED)
            log.warning("a CUDA graph could not be recorded (%s); this size runs without one", error)
            return None
        return recording

    def _note(self, key: Hashable, call: int) -> None:
        self._seen[key] = call
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
