"""Send a span for each request to OpenTelemetry, if OTEL_EXPORTER_OTLP_ENDPOINT is set and the packages are installed.

The packages read the other OTEL_* variables and the `traceparent` header of a request themselves.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from starlette.middleware import Middleware
from starlette.types import Scope

from ..config.paths import PROBES

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracing() -> list[Middleware]:
    """Return the middleware that traces requests, which must be the outermost; an empty list without tracing."""
    if not any(map(os.environ.get, ENDPOINTS)):
        return []
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return [traced_by(BatchSpanProcessor(OTLPSpanExporter()))]
    except ModuleNotFoundError:  # some of the packages may be installed for other reasons, but all are needed
        log.warning(
            "an OTLP endpoint is set, but the packages of requirements-otel.txt, which is the extra otel, are not "
            "installed: no traces are sent"
        )
        return []


def traced_by(processor: Any) -> Middleware:
    """Return the middleware that makes a span for each request except health checks.

    A span includes the answer's `Server-Timing` and `X-Request-Id`. processor: a SpanProcessor, which gets the spans.
    """
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    provider.add_span_processor(processor)
    return Middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        default_span_details=_name,
        excluded_urls=",".join(f"{re.escape(path)}/?$" for path in sorted(PROBES)),
        exclude_spans=["receive", "send"],
        http_capture_headers_server_response=["server-timing", "x-request-id"],
    )


def _name(scope: Scope) -> tuple[str, dict[str, str]]:
    # The name does not contain the path, because a client could put anything there.
    return scope["method"], {}
