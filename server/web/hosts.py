"""Check the Host header, so that a web page cannot reach the server by a name that resolves to 127.0.0.1.

Such an attack is called DNS rebinding: the page's own name is made to resolve to the address of the server.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import ServerOptions
from ..errors import BadRequest, ServerError, WrongHost
from .addresses import is_address, is_local, is_loopback, plain
from .auth import is_probe
from .failures import failure

HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?", re.ASCII)


class CheckHost:
    """Middleware that refuses requests unless they have exactly one Host header, with a name that the server accepts.

    Health checks may use any IP address, because their senders often know no name.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        """Wrap an application. options: `allowed_hosts` and `host` are read."""
        self.app = app
        self._options = options
        self._allowed = {plain(name) for name in (options.allowed_hosts or "").split(",") if name.strip()}
        if options.allowed_hosts is None and not is_local(options):
            self._allowed = {"*"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400 or 421."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await failure(Request(scope), error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServerError | None:
        sent = Headers(scope=scope).getlist("host")
        if not sent and scope["http_version"] == "1.0":
            return None  # HTTP/1.0 has no Host header; every browser sends one
        found = HOST.fullmatch(sent[0].strip()) if len(sent) == 1 else None
        if found is None:
            return BadRequest("send exactly one Host header, with the name or address of this server")
        name = plain(found["name"])
        if self._answers_for(name) or (is_probe(scope, self._options) and is_address(name)):
            return None
        return WrongHost("this server does not accept the name in the Host header")

    def _answers_for(self, name: str) -> bool:
        """Return whether the server accepts this name."""
        if not self._allowed:
            return is_loopback(name)
        return "*" in self._allowed or name in self._allowed
