"""A span a request for OpenTelemetry, when its packages are there and OTEL_EXPORTER_OTLP_ENDPOINT says where to.

The packages read the other OTEL_* variables and the request's `traceparent` themselves.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from starlette.middleware import Middleware
from starlette.types import Scope

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracing() -> list[Middleware]:
    """The outermost middleware, or none."""
    if not any(map(os.environ.get, ENDPOINTS)):
        return []
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return [traced_by(BatchSpanProcessor(OTLPSpanExporter()))]
    except ModuleNotFoundError:  # some of them may be there for other packages' sake
        log.warning("an OTLP endpoint is set, but requirements-otel.txt is not installed: no traces")
        return []


def traced_by(processor: Any) -> Middleware:
    """Spans with the answer's own times; health probes have none."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    provider.add_span_processor(processor)
    return Middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        default_span_details=_name,
        excluded_urls="/health(/live)?/?$",
        exclude_spans=["receive", "send"],
        http_capture_headers_server_response=["server-timing", "x-request-id"],
    )


def _name(scope: Scope) -> tuple[str, dict[str, str]]:
    # Not the path: a span's name must not hold what a client makes up.
    return scope["method"], {}
