"""Bodies: a tensor's or a file's own bytes, or JSON with base64 in it.

A hostile body must not block the event loop, so nothing here holds the GIL for long. A JSON body of up to twice
AROUND_BYTES is parsed whole. In a larger one only the part outside the string `inputs` is parsed, at most AROUND_BYTES
of it. base64 is decoded in pieces.
"""

from __future__ import annotations

import binascii
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import BadRequest, UnsupportedBody, WrongLength
from ..inputs.tensor import MOST_HEADER_BYTES
from ..model_info import Direction
from ..values import LATENT_DTYPES, PIXEL_DTYPES, Job, RawTensor, Request

Bytes = bytes | bytearray | memoryview

BINARY_BODIES = frozenset({"", "tensor/binary", "application/octet-stream"})
JSON_BODIES = frozenset({"tensor/base64", "application/json"})

AROUND_BYTES = 64 << 10
DEEPEST = 8  # {"parameters": {"shape": [1, …]}} is 3 deep
PIECE_BYTES = 256 << 10  # decoded within a millisecond
URL_PREFIX_BYTES = 256
EXPECTED = 'expected {"inputs": "<base64 of the bytes>", "parameters": {…}}'
NOT_BASE64 = "'inputs' is not base64; send base64.b64encode of the bytes"
BACKSLASH = ord("\\")
PADDING = {0: b"", 2: b"==", 3: b"="}  # by how many characters are left over
TO_STANDARD = bytes.maketrans(b"-_", b"+/")


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


def check_length(job: Job, found: int) -> None:
    """Raise WrongLength, with a guess at the mistake, unless a tensor of `found` bytes is what the job announces."""
    needed = job.bytes_needed
    if found == needed:
        return
    known = LATENT_DTYPES if job.direction is Direction.DECODE else PIXEL_DTYPES
    others = [name for name in known if RawTensor.bytes_needed(job.shape, name) == found]
    guess = f"was dtype={' or '.join(others)} meant?" if others else "check shape and dtype"
    if 0 < found - needed <= MOST_HEADER_BYTES:
        guess += "; if the body is a .safetensors file, leave both out"
    sizes = "x".join(map(str, job.shape))
    raise WrongLength(f"shape {sizes} of {job.dtype} needs {needed} bytes, the body has {found}; {guess}")


def with_data(job: Job, data: Bytes) -> Request:
    """Return the request of a job whose tensor has been received. Raises WrongLength."""
    check_length(job, len(data))
    return Request(job, memoryview(data))


def read_json(body: bytes | bytearray) -> tuple[bytes | bytearray, Mapping[str, Any]]:
    """Return the bytes and the parameters of `{"inputs": "<base64>", "parameters": {…}}`. Raises BadRequest.

    In a body of more than twice AROUND_BYTES, the part outside the string `inputs` may have at most AROUND_BYTES. Any
    body may be nested at most DEEPEST levels.
    """
    encoded: bytes | memoryview
    place = _longest_text(body) if len(body) > 2 * AROUND_BYTES else None
    if place is None:  # small enough to be parsed whole
        content = _parsed(bytes(body))
        encoded = _text_of(content).encode(errors="replace")
    else:
        stand_in = secrets.token_hex(16)
        content = _parsed(b"".join((body[: place.start], stand_in.encode(), body[place.stop :])))
        if _text_of(content) != stand_in:
            raise BadRequest(f"the JSON body has a text of more than {AROUND_BYTES} bytes beside 'inputs'; {EXPECTED}")
        encoded = memoryview(body)[place.start : place.stop]
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"the JSON body's 'parameters' is not an object; {EXPECTED}")
    return _decoded(encoded, is_escaped=place is not None), parameters


def read_base64(text: str) -> bytearray:
    """Return the bytes of base64: standard or URL-safe, padded or not, wrapped, or after `data:…;base64,`.

    Raises BadRequest.
    """
    return _decoded(text.encode(errors="replace"), is_escaped=False)


def _parsed(around: bytes) -> dict[str, Any]:
    """The JSON object without its long text. Raises BadRequest."""
    try:
        content = json.loads(around, strict=False)  # so that base64 may be wrapped
    except (ValueError, RecursionError):
        raise BadRequest(f"the body is not JSON; {EXPECTED}") from None
    if not isinstance(content, dict):
        raise BadRequest(f"the JSON body has no text 'inputs'; {EXPECTED}")
    if _depth(content) > DEEPEST:
        raise BadRequest(f"the JSON body is nested more than {DEEPEST} levels deep; {EXPECTED}")
    return content


def _text_of(content: dict[str, Any]) -> str:
    text = content.get("inputs")
    if not isinstance(text, str):
        raise BadRequest(f"the JSON body has no text 'inputs'; {EXPECTED}")
    return text


def _depth(value: Any) -> int:
    """How many containers are in each other, no further than is asked about."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        depth += bool(inner)
    return depth


def _longest_text(body: bytes | bytearray) -> slice:
    """Where the longest text is; no further than AROUND_BYTES of other things are looked at.

    Raises BadRequest where the others are more.
    """
    found, start = slice(0, 0), 0
    while (opening := body.find(b'"', start)) >= 0 and start - (found.stop - found.start) <= AROUND_BYTES:
        closing = _closing_quote(body, opening + 1)
        if closing - opening > found.stop - found.start:
            found = slice(opening + 1, closing)
        start = closing + 1
    if len(body) - (found.stop - found.start) > AROUND_BYTES:
        raise BadRequest(
            f"the JSON body has more than {AROUND_BYTES} bytes beside the text of 'inputs'; {EXPECTED}, "
            "or the tensor's own bytes with Content-Type: tensor/binary"
        )
    return found


def _closing_quote(body: bytes | bytearray, start: int) -> int:
    """Where the text that begins at `start` ends, or the body does. Base64 has no escaped quotes: few are skipped."""
    end = body.find(b'"', start)
    while end >= 0 and end - start <= AROUND_BYTES and _is_escaped(body, start, end):
        end = body.find(b'"', end + 1)
    return end if end >= 0 else len(body)


def _is_escaped(body: bytes | bytearray, start: int, end: int) -> bool:
    first = end
    while first > start and body[first - 1] == BACKSLASH:
        first -= 1
    return (end - first) % 2 == 1


def _decoded(encoded: bytes | memoryview, *, is_escaped: bool) -> bytearray:
    """The bytes of base64. is_escaped: it is the inside of a JSON text. Raises BadRequest."""
    data, left, padding = bytearray(), b"", b""  # not of its final size: filling 100 MiB with zeros takes too long
    try:
        for piece in _plain_pieces(_after_prefix(encoded), is_escaped):
            characters, equals, _ = piece.partition(b"=")
            if padding and characters:
                raise ValueError
            padding += piece[len(characters) :] if equals else b""
            characters = left + characters
            whole = len(characters) // 4 * 4
            left = characters[whole:]
            data += binascii.a2b_base64(characters[:whole], strict_mode=True)
        if padding not in (b"", PADDING[len(left)]):
            raise ValueError
        data += binascii.a2b_base64(left + PADDING[len(left)], strict_mode=True)
    except (binascii.Error, ValueError, KeyError):
        raise BadRequest(NOT_BASE64) from None
    return data


def _after_prefix(encoded: bytes | memoryview) -> memoryview:
    """Without `data:image/png;base64,`, as browsers' FileReader writes it. Raises ValueError."""
    begin, view = bytes(encoded[:URL_PREFIX_BYTES]), memoryview(encoded)
    if not begin.lower().startswith(b"data:"):
        return view
    prefix, comma, _ = begin.partition(b",")
    if not comma or not prefix.lower().endswith(b";base64"):
        raise ValueError
    return view[len(prefix) + 1 :]


def _plain_pieces(encoded: memoryview, is_escaped: bool) -> Iterator[bytes]:
    """Pieces of standard base64 without white space. Raises ValueError."""
    held = b""  # the beginning of an escape that the next piece ends
    for start in range(0, len(encoded), PIECE_BYTES):
        piece = held + bytes(encoded[start : start + PIECE_BYTES])
        held = b""
        if is_escaped and b"\\" in piece:
            whole = piece.rfind(b"\\", len(piece) - 5)
            if whole >= 0 and start + PIECE_BYTES < len(encoded):
                piece, held = piece[:whole], piece[whole:]
            piece = json.loads(b'"' + piece + b'"', strict=False).encode()
        yield piece.translate(TO_STANDARD, delete=b" \t\r\n\v\f")
