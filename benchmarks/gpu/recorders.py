"""Recorders of graphs that count, also on a CPU, where a recording computes the function again."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from server.engine.graphs import CudaRecorder, Function, Graphs, Recorder, Recording


class CpuRecorder:
    """Records nothing. With it a coder on a CPU chooses, keeps and drops recordings as it does on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held_bytes = device, 0

    def record(self, function: Function, x: Tensor) -> Recording:
        """Return the function."""
        return function

    def forget(self) -> None:
        """Do nothing."""


class CountingRecorder:
    """Counts the recordings of another recorder, and adds up their time in seconds."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.recorded, self.seconds = 0, 0.0

    @property
    def device(self) -> torch.device:
        """The device of the other recorder."""
        return self.recorder.device

    @property
    def held_bytes(self) -> int:
        """The bytes that the other recorder holds."""
        return self.recorder.held_bytes

    def record(self, function: Function, x: Tensor) -> Recording:
        """Record a function."""
        started = time.perf_counter()
        recording = self.recorder.record(function, x)
        self.recorded += 1
        self.seconds += time.perf_counter() - started
        return recording

    def forget(self) -> None:
        """Free what the recordings of the other recorder share."""
        self.recorder.forget()


def with_graphs(coder: Any, device: str) -> CountingRecorder:
    """Give a coder of images new graphs, and return the recorder that counts them."""
    where = coder.network.device
    recorder = CountingRecorder(CudaRecorder(where) if device == "cuda" else CpuRecorder(where))
    coder.graphs = Graphs(recorder)
    return recorder
