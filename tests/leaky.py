"""A worker that keeps a copy of every picture: the control that the soak must find."""

from __future__ import annotations

import socket
from typing import Any

from server.config import Settings
from server.engine import runner, worker

kept: list[bytes] = []


def main(connection: socket.socket, settings: Settings) -> None:
    render = runner._render

    def keeping(request: Any, result: Any, *rest: Any) -> None:
        kept.append(bytes(result.body.data) + b"\1" * 65536)
        render(request, result, *rest)

    runner._render = keeping
    worker.main(connection, settings)
