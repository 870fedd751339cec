"""A worker process with faults, which a request asks for by its first latent value. `FAULTS` names them.

Gates and counts are files beside models.yaml, where the test can make and read them.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from server.config import Settings
from server.engine import pipeline, runner, tensors, worker
from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.interface import Coded
from server.engine.weights import loading
from server.outputs import format_named
from server.values import Layout

CRASH, CRASH_ONCE, HANG, WAIT = 1001.0, 1002.0, 1003.0, 1004.0
MEMORY_ONCE, MEMORY_TWICE, MEMORY_ALWAYS = 1005.0, 1006.0, 1007.0
OVERFLOW, LOST_DEVICE_ONCE, DISK_FULL, SLOW_RENDER, BUG = 1008.0, 1009.0, 1010.0, 1011.0, 1012.0
STEPS = 1013.0  # works step by step until the gate is opened
FAULTS = {value: name for name, value in vars().items() if isinstance(value, float)}


def main(connection: socket.socket, settings: Settings) -> None:
    folder = settings.source.parent
    decode, load = ExactKLDecoder.decode, loading.load_vae

    def faulty_load(info: Any, *rest: Any) -> Any:
        if info.name == "half" and (folder / "load-kills").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return load(info, *rest)

    loading.load_vae = faulty_load

    def faulty(self: ExactKLDecoder, latents: torch.Tensor, layout: Layout, **rest: Any) -> Coded:
        (folder / "decodes").open("a").write("." * len(latents))
        for latent in latents:
            fail(float(latent.flatten()[0]), folder, rest["budget_bytes"], rest["check"])
        coded = decode(self, latents, layout, **rest)
        if any(float(latent.flatten()[0]) == OVERFLOW for latent in latents) and latents.dtype != torch.float32:
            return Coded(coded.tensor, torch.zeros((), dtype=torch.bool))
        return coded

    ExactKLDecoder.decode = faulty
    render = runner._render

    def faulty_render(request: Any, *rest: Any) -> None:
        first = float(tensors.to_device(request.tensor, torch.device("cpu")).flatten()[0])
        if first == SLOW_RENDER:
            wait_for(folder / "rendered")
        if first == DISK_FULL:
            request = replace(request, job=replace(request.job, format="full"))
        render(request, *rest)

    runner._render = faulty_render
    runner.format_named = lambda name: Full() if name == "full" else format_named(name)
    worker.main(connection, settings)


class Full:
    """A format whose rendering fills the disk."""

    render_frames = None

    def render(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def fail(fault: float, folder: Path, budget_bytes: int | None, check: Callable[[], None]) -> None:
    match FAULTS.get(fault):
        case "CRASH":
            os.kill(os.getpid(), signal.SIGKILL)
        case "CRASH_ONCE" if is_first(folder / "crashed"):
            os.kill(os.getpid(), signal.SIGKILL)
        case "HANG":
            time.sleep(1000)
        case "STEPS":
            while not (folder / "open").exists():
                time.sleep(0.005)
                check()
        case "WAIT":
            wait_for(folder / "open")
        case "MEMORY_ONCE" if is_first(folder / "memory"):
            raise torch.OutOfMemoryError
        case "MEMORY_TWICE" if budget_bytes != pipeline.SMALLEST_BUDGET_BYTES:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        case "MEMORY_ALWAYS":
            raise torch.OutOfMemoryError
        case "LOST_DEVICE_ONCE" if is_first(folder / "lost"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "BUG":
            raise ZeroDivisionError("/tmp/secret at 0x7fffdeadbeef")


def is_first(mark: Path) -> bool:
    """Whether it happens for the first time, whichever process this is."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.005)
