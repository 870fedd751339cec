"""What every request gets: an id, a log line, a count in the metrics, and a JSON answer even if there is a bug."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ServerError, Unavailable
from .failures import failure
from .responses import BrokenAnswer

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
CLIENT_LEFT = 499  # nginx's status for the log and the metrics; it is never sent


class RequestScope:
    """Middleware that gives every request its id, log line, count and answer. Also removes slashes at the path's end.

    It is outside all other middleware except tracing and `ExposeAnswers`.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if the application fails without an answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "bytes_in": 0, "bytes_out": 0}
        scope["path"] = scope["path"].rstrip("/") or "/"
        status = CLIENT_LEFT

        async def receive_counted() -> Message:
            message = await receive()
            scope["state"]["bytes_in"] += len(message.get("body", b""))
            return message

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)
            scope["state"]["bytes_out"] += len(message.get("body", b""))

        try:
            await self.app(scope, receive_counted, send_framed)
        except ClientDisconnect:
            if status != CLIENT_LEFT:
                log.warning(
                    "an answer was cut off because its client left or read too slowly", extra={"request_id": request_id}
                )
                scope["app"].state.service.metrics.cancelled.labels("sending").inc()
            status = CLIENT_LEFT
        except BrokenAnswer as broken:
            log.warning("a streamed answer broke off: %s", broken, extra={"request_id": request_id})
            scope["state"]["code"] = broken.error.code
            status = broken.error.status  # for the log and the metrics; the client has got 200
        except asyncio.CancelledError:  # by uvicorn, when the time to shut down has passed; it would log this as a bug
            if status == CLIENT_LEFT:
                error = Unavailable("the server is shutting down and did not finish this request; try again later")
                await failure(Request(scope), error)(scope, receive, send_framed)
        except Exception:  # nothing may escape from a request: whatever went wrong, its client must get an answer
            log.exception("a request failed", extra={"request_id": request_id})
            if status == CLIENT_LEFT:
                await failure(Request(scope), ServerError())(scope, receive, send_framed)
        finally:
            _account(scope, status, time.perf_counter() - started)


def _account(scope: Scope, status: int, seconds: float) -> None:
    """Count the request and write its log line."""
    metrics, state = scope["app"].state.service.metrics, scope["state"]
    route, model = state.get("route", "none"), state.get("model", "none")
    metrics.requests.labels(route, model, str(status)).inc()
    metrics.duration_s.labels(route, model).observe(seconds)
    known = {"route": route, "model": model, "status": status, "ms": round(seconds * 1e3)}
    asked = ("request_id", "caller", "code", "queue_ms", "size", "bytes_in", "bytes_out")
    log.log(
        logging.DEBUG if state.get("is_quiet") else logging.INFO,
        "answered",
        extra={**known, **{key: state.get(key) for key in asked}},
    )
