"""Run uvicorn so that the first signal drains the server, and the second one ends it at once.

While it drains, the server answers the accepted requests and refuses new ones.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ..scheduling.service import Service
from .protocol import uvicorn_config

log = logging.getLogger(__name__)

# How long uvicorn waits for open connections when it stops. All answers have been sent by then, so only idle
# connections and incomplete uploads are open.
CLOSE_S = 1


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains the service when it gets a signal.

    The process exits with status 0 after a signal; uvicorn's own class would raise the signal again.
    """

    def __init__(self, service: Service, app: Starlette, on_drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Make a server that has not started.

        app: the application of the service. on_drain: called when the drain begins; the server waits for it too.
        """
        super().__init__(uvicorn_config(app))
        self.config.timeout_graceful_shutdown = CLOSE_S
        self._service = service
        self._on_drain = on_drain
        self._is_told = False
        self._drain: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, and also SIGHUP, which a closed terminal sends.

        SIGHUP stays ignored if it was, which is what nohup does.
        """
        usual = signal.getsignal(signal.SIGHUP)
        if usual is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)
        with super().capture_signals():
            yield
        signal.signal(signal.SIGHUP, usual)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but close the application after a second signal too, which releases the workers."""
        await super().shutdown(sockets)
        if self.force_exit:
            self._service.end_devices()
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first SIGTERM, SIGINT or SIGHUP; end at the second."""
        if self._is_told:
            self.force_exit = self.should_exit = True
        self._is_told = True
        asyncio.get_running_loop().call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        waited = [self._service.drain(), *([self._on_drain()] if self._on_drain else [])]
        for outcome in await asyncio.gather(*waited, return_exceptions=True):
            if isinstance(outcome, Exception):  # whatever failed, the server must still end
                log.error("a part of the shutdown failed", exc_info=outcome)
        self.should_exit = True
