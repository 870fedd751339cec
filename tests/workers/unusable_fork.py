"""A worker in which CUDA is unusable if it was forked, as after an import that asked for CUDA devices."""

from __future__ import annotations

import os
import socket

import torch

from server.config import Settings
from server.engine import worker


def main(connection: socket.socket, settings: Settings) -> None:
    """Serve as a worker. The file `front` has the id of the front process; `no-driver` says that there is no driver."""
    folder = settings.source.parent
    front = int((folder / "front").read_text())
    is_forked = os.getppid() != front  # its parent is the fork server
    torch.cuda._is_in_bad_fork = lambda: is_forked
    worker.has_cuda_driver = lambda: not (folder / "no-driver").exists()
    worker.main(connection, settings)
