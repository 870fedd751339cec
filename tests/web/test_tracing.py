"""Traces: off unless an endpoint is named, one span a request, in the caller's trace, with the answer's own times."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from typing import Any

import pytest
import requests

from server.web import app, tracing
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.test_errors import BINARY, post

PACKAGES = {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http", "opentelemetry-instrumentation-asgi"}
is_installed = {found.name for found in distributions()} >= PACKAGES
needs_packages = pytest.mark.skipif(not is_installed, reason="requirements-otel.txt is not installed")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_traced_unless_an_endpoint_is_named() -> None:
    assert tracing.tracing() == []


def test_an_endpoint_without_the_packages_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    assert tracing.tracing() == []
    assert "requirements-otel.txt, which is the extra otel, are not installed" in caplog.text


@needs_packages
def test_an_endpoint_with_the_packages_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9")
    (middleware,) = tracing.tracing()
    middleware.kwargs["tracer_provider"].shutdown()


@needs_packages
def test_a_request_is_one_span_of_its_callers_trace(
    serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    monkeypatch.setattr(app, "tracing", lambda: [tracing.traced_by(SimpleSpanProcessor(exporter))])
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}})
    traceparent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    answer = post(address, headers={**BINARY, "traceparent": traceparent, "X-API-Key": "hush-hush"})
    assert requests.get(address + "health", timeout=300).ok
    (span,) = exporter.get_finished_spans()
    attributes: dict[str, Any] = dict(span.attributes or {})
    assert span.name == "POST"
    assert format(span.context.trace_id, "x") == "ab" * 16
    assert span.parent is not None
    assert format(span.parent.span_id, "x") == "cd" * 8
    assert attributes["http.response.header.server_timing"] == (answer.headers["server-timing"],)
    assert attributes["http.response.header.x_request_id"] == (answer.headers["x-request-id"],)
    assert "hush-hush" not in str(attributes)
