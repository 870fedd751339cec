"""Refuse requests of web pages of other sites, unless `--cors-origins` lists the page's origin.

This is needed because a browser lets any page send requests to 127.0.0.1 or into a local network, even if the page
cannot read the answers.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import ServerOptions
from ..errors import CrossSite
from .auth import is_probe
from .failures import failure

EXPOSED = (
    "shape, dtype, Server-Timing, X-Request-Id, X-VAE-Upcast, Retry-After, Location, Preference-Applied, "
    "WWW-Authenticate, Allow"
)
METHODS = "GET, HEAD, POST, DELETE"
PREFLIGHT_S = 600
HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+( *, *[A-Za-z0-9-]+)*", re.ASCII)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """The origins that `--cors-origins` lists."""

    def __init__(self, options: ServerOptions) -> None:
        """Read the origins from the options."""
        listed = (options.cors_origins or "").split(",")
        self._listed = frozenset(origin.strip() for origin in listed if origin.strip())

    def grant(self, headers: Headers) -> str | None:
        """Return the Access-Control-Allow-Origin header for a request; None if no listed origin sent the request."""
        origin = headers.get("origin")
        if origin is None or not (self._listed & {"*", origin}):
            return None
        return "*" if "*" in self._listed else origin


class ExposeAnswers:
    """Middleware that lets pages of listed origins read all answers. It surrounds RequestScope to include errors."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        """Wrap an application. options: `cors_origins` is read."""
        self.app = app
        self._origins = Origins(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the CORS headers to its answer if a listed origin sent it."""
        granted = self._origins.grant(Headers(scope=scope)) if scope["type"] == "http" else None
        if granted is None:
            await self.app(scope, receive, send)
            return

        async def send_exposed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Access-Control-Allow-Origin"] = granted
                headers["Access-Control-Expose-Headers"] = EXPOSED
                headers.add_vary_header("Origin")
            await send(message)

        await self.app(scope, receive, send_exposed)


class CheckOrigin:
    """Middleware that refuses requests of pages of other origins, and answers the preflight requests of listed ones."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        """Wrap an application. options: `cors_origins` and the health routes are read."""
        self.app = app
        self._options = options
        self._origins = Origins(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, answer a preflight request, or answer 403."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, app = Headers(scope=scope), self.app
        if self._origins.grant(headers) is not None:
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                app = preflight(headers)
        elif _is_foreign(scope, headers) and not is_probe(scope, self._options):
            app = failure(Request(scope), CrossSite("this server refuses requests from web pages of other sites"))
        await app(scope, receive, send)


def preflight(asked: Headers) -> Response:
    """Return the answer to a preflight request, which allows a listed page to send its request.

    asked: the headers of the preflight request.
    """
    headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": str(PREFLIGHT_S)}
    names = asked.get("access-control-request-headers", "")
    if HEADER_NAMES.fullmatch(names):
        headers["Access-Control-Allow-Headers"] = names
    if asked.get("access-control-request-private-network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=headers)


def _is_foreign(scope: Scope, headers: Headers) -> bool:
    """Return whether a page of another origin sent a request.

    A link that a person follows does not count, because no page can read what it opens.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:  # browsers set this header, and a page cannot forge it
        is_followed_link = (
            scope["method"] in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        return site not in ("same-origin", "none") and not is_followed_link
    origin = headers.get("origin")
    return origin is not None and not _is_own(origin, headers.get("host", ""))


def _is_own(origin: str, host: str) -> bool:
    """Return whether an origin and a Host header have the same name and port.

    The scheme is not compared, because a proxy in front of this server may speak TLS.
    """
    scheme, _, name = origin.lower().partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    return bool(name) and name.removesuffix(port) == host.strip().lower().removesuffix(port)
