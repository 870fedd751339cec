"""Bodies: a tensor's or a file's own bytes, or JSON with base64 in it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from server.errors import BadRequest, UnsupportedBody

BINARY_BODIES = frozenset({"", "tensor/binary", "application/octet-stream"})
JSON_BODIES = frozenset({"tensor/base64", "application/json"})


def is_json_body(content_type: str | None, content_encoding: str | None, *, may_be_file: bool = False) -> bool:
    """Whether the body is JSON with base64 in it, or the bytes themselves. Raises UnsupportedBody."""
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise UnsupportedBody("compressed bodies are not read; send the bytes without Content-Encoding")
    media_type = (content_type or "").split(";")[0].strip().lower()
    if media_type in JSON_BODIES:
        return True
    if may_be_file and not media_type.startswith("multipart/"):  # the bytes say what they are; curl calls all a form
        return False
    if media_type in BINARY_BODIES:
        return False
    if may_be_file:
        raise UnsupportedBody("forms are not read; send the file itself as the body (curl: --data-binary @FILE)")
    known = ", ".join(sorted((BINARY_BODIES | JSON_BODIES) - {""}))
    raise UnsupportedBody(f"the body's Content-Type is not one of {known}; send tensor/binary and the tensor's bytes")


def read_json(body: bytes | bytearray) -> tuple[bytes, Mapping[str, Any]]:
    """`{"inputs": "<base64>", "parameters": {…}}` to the tensor's bytes and the parameters. Raises BadRequest."""
    expected = 'expected {"inputs": "<base64 of the bytes>", "parameters": {…}}'
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest(f"the body is not JSON; {expected}") from None
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), str):
        raise BadRequest(f"the JSON body has no text 'inputs'; {expected}")
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"the JSON body's 'parameters' is not an object; {expected}")
    return read_base64(content["inputs"]), parameters


def read_base64(text: str) -> bytes:
    """Raises BadRequest."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # `base64 FILE` breaks its lines
    except (binascii.Error, ValueError):
        raise BadRequest("'inputs' is not base64; send base64.b64encode of the bytes") from None
