"""Choose which connection to close when there are too many, and count TLS handshakes as connections.

With `create_server(ssl=…)`, a protocol learns of a TLS connection only after its handshake. Until then nothing would
limit how many silent connections hold a file descriptor. `loop.start_tls` cannot replace it: uvloop reads and loses the
bytes of a client that arrive before that call.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

TURNS = itertools.count()  # orders events, because several may have the same time on the event loop's clock


class Open(Protocol):
    """An open connection. became_idle: the turn at which it became idle."""

    became_idle: int

    @property
    def is_idle(self) -> bool:
        """Whether it may be closed for another one."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def close_longest_idle(connections: Iterable[object], newest: object) -> bool:
    """Close the connection that has been idle for the longest time. Return False if none is, beside the newest one."""
    others = (cast("Open", other) for other in connections if other is not newest)
    idle = [other for other in others if other.is_idle]
    if idle:
        min(idle, key=lambda other: other.became_idle).close()
    return bool(idle)


class Tls(SSLProtocol):
    """The TLS of a connection, which counts as one of the server's connections during its handshake.

    It is then idle in the sense of `Open`, so a newer connection may take its place. After the handshake, the protocol
    of HTTP is the member.
    """

    is_idle = True

    def __init__(
        self,
        http: asyncio.Protocol,
        connections: set[Any],
        context: ssl.SSLContext,
        *,
        most: int,
        timeout_s: float,
        shutdown_timeout_s: float,
    ) -> None:
        """Prepare for a connection, on the running event loop.

        http: the HTTP protocol, which receives the decrypted bytes. connections: all open connections of the server.
        most: how many there may be. timeout_s: the time for the handshake. shutdown_timeout_s: the time for the end of
        the TLS connection.
        """
        self._connections, self._most = connections, most
        super().__init__(
            asyncio.get_running_loop(),
            _Secured(http, self.forget),
            context,
            None,  # type: ignore[arg-type]  # nothing awaits the handshake
            server_side=True,
            ssl_handshake_timeout=timeout_s,  # type: ignore[arg-type]  # a float is as good
            ssl_shutdown_timeout=shutdown_timeout_s,
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is that of a socket
        """Begin the handshake. If there are too many connections, close an idle one; if none is idle, this one."""
        self.became_idle = next(TURNS)
        self._raw = transport
        self._connections.add(self)
        super().connection_made(transport)
        if len(self._connections) > self._most and not close_longest_idle(self._connections, self):
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection, whose handshake may have failed or taken too long."""
        self.forget()
        super().connection_lost(exc)

    def close(self) -> None:
        """End the connection before its handshake is complete."""
        self.forget()
        self._raw.abort()

    shutdown = close  # the name by which uvicorn calls it when it stops

    def forget(self) -> None:
        """Stop being a member of the connections."""
        self._connections.discard(self)


class _Secured(asyncio.Protocol):
    """Passes a connection on to the protocol of HTTP after its handshake."""

    def __init__(self, http: asyncio.Protocol, on_secured: Callable[[], None]) -> None:
        self._http, self._on_secured = http, on_secured

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as above
        self._on_secured()
        transport.set_protocol(self._http)
        self._http.connection_made(transport)
