"""schemathesis asks a running server what its own description allows, and what it does not."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.web.openapi import DESCRIPTION

CONFORMS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
ASKED = [
    (path, method, mode)
    for path, item in DESCRIPTION["paths"].items()
    for method in ("get", "post")
    if method in item
    for mode in schemathesis.GenerationMode
    if mode.is_positive or "parameters" in item[method]  # without any there is nothing to ask wrongly
]

schemathesis.openapi.media_type("application/octet-stream", strategies.binary(max_size=2048))


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), ASKED)
def test_the_server_answers_as_described(url: str, path: str, method: str, mode: schemathesis.GenerationMode) -> None:
    # Not by schemathesis' pytest decorator, whose plugin is older than this pytest.
    operation = schemathesis.openapi.from_url(url + "openapi.json")[path][method]
    checks = [*CONFORMS, not_a_server_error]

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if is_number(case.headers.get("X-Request-Timeout", "")):
            case.headers["X-Request-Timeout"] = "300"  # a short one, which is allowed, rightly gives 504
        case.validate_response(case.call(timeout=300), checks=checks)

    ask()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "encode"])
@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp", "video/mp4", "tensor/binary"])
def test_any_bytes_of_these_types_are_answered(url: str, path: str, media_type: str) -> None:
    """openapi.json names no types of files, so that nothing above sends them."""

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(strategies.binary(max_size=2048))
    def ask(body: bytes) -> None:
        answer = requests.post(url + path, data=body, headers={"Content-Type": media_type}, timeout=300)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]

    ask()


def is_number(text: str) -> bool:
    with suppress(ValueError):
        return math.isfinite(float(text))
    return False
