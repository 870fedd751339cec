"""Answer every failure with the same JSON object: `error`, `code` and `request_id`."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from ..errors import MethodNotAllowed, NotFound, ServerError
from .addresses import is_local

NO_ROUTE = (
    "there is no such route; POST / or /{model} decodes, POST /encode or /{model}/encode encodes, "
    "GET /models lists the models"
)


def as_json(error: ServerError, request_id: str, *, to_operator: bool = False) -> JSONResponse:
    """Return the response for an error.

    request_id: the id of the request, for the body and the X-Request-Id header.
    to_operator: the client is the operator, so the sentence says directly what to do.
    """
    body = {"error": error.told(to_operator=to_operator), "code": error.code, "request_id": request_id}
    headers = {"X-Request-Id": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the request may still arrive
    response = JSONResponse(body, error.status, headers)
    if error.status == 401:  # two header lines, because Chromium reads only the first challenge of a line
        for challenge in ("Bearer", 'Basic realm="vae", charset="UTF-8"'):
            response.headers.append("WWW-Authenticate", challenge)
    return response


def failure(request: Request, error: ServerError) -> JSONResponse:
    """Count an error of a request that reached the application, and return its response.

    If the server accepts only loopback addresses and names, the client is assumed to be the operator.
    """
    service = request.app.state.service
    request.state.code = error.code
    service.metrics.rejected.labels(error.code, getattr(request.state, "model", "none")).inc()
    options = service.settings.options
    return as_json(error, request.state.request_id, to_operator=is_local(options) and options.allowed_hosts is None)


async def on_server_error(request: Request, error: Exception) -> Response:
    """Return the response for an error that this server raised."""
    assert isinstance(error, ServerError)
    return failure(request, error)


def _methods_here(request: Request) -> set[str]:
    """Return the methods of all routes with this path. Starlette would name only those of the first one."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods}


def _is_unknown_model(request: Request) -> bool:
    """Return whether the path matches /{model}, but there is no such model.

    GET /favicon.ico is such a path: it matches POST /{model} except for its method, and 404 is the right answer.
    """
    name = request.scope.get("path_params", {}).get("model")
    return name is not None and request.app.state.service.settings.name_of(name) is None


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the response for an error that Starlette raised, such as 404 and 405 of its router."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and not _is_unknown_model(request):
        allowed = ", ".join(sorted(_methods_here(request)))
        response = failure(request, MethodNotAllowed(f"this route allows only {allowed}; see /openapi.json"))
        response.headers["Allow"] = allowed
        return response
    if error.status_code in (404, 405):
        return failure(request, NotFound(NO_ROUTE))
    other = ServerError(str(error.detail))
    other.status, other.code = error.status_code, f"http_{error.status_code}"
    return failure(request, other)
