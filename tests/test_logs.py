"""Log lines: one a record, with what is known of the request, and no client can forge one."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from server.logs import JsonFormatter, TextFormatter, write_logs
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.test_errors import BINARY, post

NASTY = "one\r\ntwo\x1b[31m\x00\x85\u2028three"


def record(message: str, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("a.b").makeRecord("a.b", logging.WARNING, "f", 1, message, (), None, extra=extra)


def test_a_text_line_is_one_line_with_the_fields_that_are_known() -> None:
    line = TextFormatter().format(record("answered", request_id="r1", status=200, ms=12, model=None))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00 WARNING a.b answered request_id=r1 status=200 ms=12", line)


def test_control_characters_do_not_reach_a_terminal() -> None:
    line = TextFormatter().format(record(NASTY))
    assert line.endswith(r"one\r\ntwo\x1b[31m\x00\x85\u2028three")


def test_a_json_line_is_one_object() -> None:
    line = JsonFormatter().format(record(NASTY, request_id="r1", route="decode", ms=12))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    told = json.loads(line)
    assert (told["message"], told["level"], told["logger"]) == (NASTY, "WARNING", "a.b")
    assert (told["request_id"], told["route"], told["ms"]) == ("r1", "decode", 12)


def test_a_traceback_is_kept_and_its_text_escaped() -> None:
    try:
        raise ValueError(NASTY)
    except ValueError:
        trouble = logging.getLogger("a").makeRecord("a", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    lines = TextFormatter().format(trouble).split("\n")
    assert all(line.startswith("    ") for line in lines[1:])
    assert not re.search("[\x00-\x09\x0b-\x1f\x85\u2028]", "".join(lines))
    assert "ValueError: one" in json.loads(JsonFormatter().format(trouble))["exception"]


@pytest.mark.parametrize("layout", ["text", "json"])
def test_a_request_is_one_line_without_its_query_body_or_headers(
    serve: Serve, vaes: dict[str, LocalVae], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "stderr", written)
    write_logs("info", layout)
    try:
        address = serve({"sd": {"repo": str(vaes["sd"].folder)}})
        answer = post(address, headers={**BINARY, "X-Request-Id": "mine", "User-Agent": "secret-agent"})
        post(address, path="secret/path")
    finally:
        logging.getLogger().setLevel(logging.WARNING)
    (line,) = [line for line in written.getvalue().splitlines() if "mine" in line]
    assert answer.ok
    for key, value in [("route", "decode"), ("model", "sd"), ("status", "200")]:
        assert re.search(rf"\b{key}\b\W+{value}\b", line)
    for hidden in ("secret", "shape", "float32", str(Path(vaes["sd"].folder))):
        assert hidden not in written.getvalue()
