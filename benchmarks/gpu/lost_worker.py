"""A worker process that loses its GPU, once for each of two first values of the latents."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.config import Settings
from server.engine import worker
from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.interface import Coded

ILLEGAL, ASSERTED = 1024.0, 2048.0  # float16 and bfloat16 represent them exactly
FAR = 1 << 44  # bytes beyond a tensor, where no memory is

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def write_kernel(x_ptr, far):
        """Write one value far beyond a tensor."""
        tl.store(x_ptr + far, 1.0)


def main(connection: socket.socket, settings: Settings) -> None:
    """Serve as `server.engine.worker.main` does."""
    folder, decode = settings.source.parent, ExactKLDecoder.decode

    def faulty(self: ExactKLDecoder, latents: Tensor, *rest: Any, **named: Any) -> Coded:
        first = float(latents.flatten()[0])
        if first in (ILLEGAL, ASSERTED) and is_first(folder / f"lost-{first:.0f}"):
            lose(latents.device, first)
        return decode(self, latents, *rest, **named)

    ExactKLDecoder.decode = faulty
    worker.main(connection, settings)


def is_first(mark: Path) -> bool:
    """Return whether this happens for the first time, in any process."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def lose(device: torch.device, first: float) -> None:
    """Cause an error of CUDA, raised by the synchronisation, after which every later call of this process fails."""
    x = torch.zeros(1, device=device)
    if first == ILLEGAL and importlib.util.find_spec("triton") is not None:
        write_kernel[(1,)](x, FAR // x.itemsize)
    else:
        x[torch.full((1,), FAR, device=device)].sum()
    torch.cuda.synchronize(device)
