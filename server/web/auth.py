"""Require API keys.

A client sends its key as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of Basic authentication,
which is what the address `http://user:KEY@host/` does.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import ApiKey, ServerOptions
from ..config.paths import PROBES
from ..errors import Unauthorized
from .failures import failure


def is_probe(scope: Scope, options: ServerOptions) -> bool:
    """Return whether a request is a health check: a GET or HEAD of a health route."""
    return scope["method"] in ("GET", "HEAD") and scope["path"] in PROBES | {options.health_route}


class RequireKey:
    """Middleware that refuses requests without a known key, except health checks. Without keys it refuses nothing."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], options: ServerOptions) -> None:
        """Wrap an application. keys: the known keys."""
        self.app = app
        self._options = options
        self._keys = [(known.name, known.key.get_secret_value().encode()) for known in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with the name of its key in `scope["state"]["caller"]`, or answer 401."""
        if scope["type"] != "http" or not self._keys or is_probe(scope, self._options):
            await self.app(scope, receive, send)
            return
        sent = sent_key(scope)
        caller = self._name_of(sent)
        if caller is not None:
            scope["state"]["caller"] = caller
            await self.app(scope, receive, send)
            return
        wrong = "this server does not know the key that was sent" if sent else "a key is required"
        sentence = wrong + ": send Authorization: Bearer KEY, X-API-Key: KEY, or http://user:KEY@host/"
        await failure(Request(scope), Unauthorized(sentence))(scope, receive, send)

    def _name_of(self, key: bytes) -> str | None:
        # Every key is compared in constant time, so that the timing reveals neither the key nor its place in the list.
        names = [name for name, known in self._keys if hmac.compare_digest(key, known)]
        return names[0] if names else None


def sent_key(scope: Scope) -> bytes:
    """Return the key that a request sent; empty if it sent none, or none that can be read."""
    headers = Headers(scope=scope)
    if key := headers.get("x-api-key"):
        return key.encode("latin-1")
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
