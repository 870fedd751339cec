"""Read the body of a request: the bytes of a tensor or a file, or JSON that contains them in base64.

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
DEEPEST = 8  # levels of nesting; {"parameters": {"shape": [1, …]}} has 3
PIECE_BYTES = 256 << 10  # of base64; decoding so much takes less than a millisecond
URL_PREFIX_BYTES = 256
EXPECTED = 'expected {"inputs": "<base64 of the bytes>", "parameters": {…}}'
NOT_BASE64 = "'inputs' is not base64; send base64.b64encode of the bytes"
BACKSLASH = ord("\\")
PADDING = {0: b"", 2: b"==", 3: b"="}  # by the number of characters after the last group of four
TO_STANDARD = bytes.maketrans(b"-_", b"+/")


def is_json_body(content_type: str | None, content_encoding: str | None, *, may_be_file: bool = False) -> bool:
    """Return True if the body is JSON that contains base64, False if it is the bytes themselves.

    content_type, content_encoding: the headers; None if there is none.
    may_be_file: the body may also be a file, which is recognized by its first bytes, whatever its type.

    Raises UnsupportedBody for a type that the server does not read, and for a compressed body.
    """
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise UnsupportedBody("the server does not read compressed bodies; send the body without Content-Encoding")
    media_type = (content_type or "").split(";")[0].strip().lower()
    if media_type in JSON_BODIES:
        return True
    if may_be_file and not media_type.startswith("multipart/"):  # curl declares every body as a form by default
        return False
    if media_type in BINARY_BODIES:
        return False
    if may_be_file:
        raise UnsupportedBody(
            "the server does not read forms; send the file itself as the body (curl: --data-binary @FILE)"
        )
    known = ", ".join(sorted((BINARY_BODIES | JSON_BODIES) - {""}))
    raise UnsupportedBody(f"the body's Content-Type is not one of {known}; send tensor/binary and the tensor's bytes")


def check_length(job: Job, found: int) -> None:
    """Raise WrongLength if a body of `found` bytes does not fit the shape and the dtype of the job.

    The sentence of the error contains a guess at the mistake.
    """
    needed = job.bytes_needed
    if found == needed:
        return
    known = LATENT_DTYPES if job.direction is Direction.DECODE else PIXEL_DTYPES
    others = [name for name in known if RawTensor.bytes_needed(job.shape, name) == found]
    guess = f"was dtype={' or '.join(others)} meant?" if others else "check shape and dtype"
    if 0 < found - needed <= MOST_HEADER_BYTES:
        guess += "; if the body is a .safetensors file, leave shape and dtype out"
    sizes = "x".join(map(str, job.shape))
    raise WrongLength(f"shape {sizes} of {job.dtype} needs {needed} bytes, but the body has {found}; {guess}")


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
            raise BadRequest(
                f"the JSON body has a string of more than {AROUND_BYTES} bytes that is not 'inputs'; {EXPECTED}"
            )
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
    """Parse a JSON object, whose long string has been replaced by a short one. Raises BadRequest."""
    try:
        content = json.loads(around, strict=False)  # not strict: base64 that is wrapped contains line ends
    except (ValueError, RecursionError):
        raise BadRequest(f"the body is not JSON; {EXPECTED}") from None
    if not isinstance(content, dict):
        raise BadRequest(f"the JSON body has no string 'inputs'; {EXPECTED}")
    if _depth(content) > DEEPEST:
        raise BadRequest(f"the JSON body is nested more than {DEEPEST} levels deep; {EXPECTED}")
    return content


def _text_of(content: dict[str, Any]) -> str:
    text = content.get("inputs")
    if not isinstance(text, str):
        raise BadRequest(f"the JSON body has no string 'inputs'; {EXPECTED}")
    return text


def _depth(value: Any) -> int:
    """Return how many levels of lists and objects are nested, or DEEPEST + 1 if there are more than DEEPEST."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        depth += bool(inner)
    return depth


def _longest_text(body: bytes | bytearray) -> slice:
    """Return the place of the longest string in a JSON body, without its quotes.

    The search ends after AROUND_BYTES outside of that string. Raises BadRequest if the body has more than AROUND_BYTES
    outside of it.
    """
    found, start = slice(0, 0), 0
    while (opening := body.find(b'"', start)) >= 0 and start - (found.stop - found.start) <= AROUND_BYTES:
        closing = _closing_quote(body, opening + 1)
        if closing - opening > found.stop - found.start:
            found = slice(opening + 1, closing)
        start = closing + 1
    if len(body) - (found.stop - found.start) > AROUND_BYTES:
        raise BadRequest(
            f"the JSON body has more than {AROUND_BYTES} bytes outside the string 'inputs'; {EXPECTED}, "
            "or the tensor's bytes with Content-Type: tensor/binary"
        )
    return found


def _closing_quote(body: bytes | bytearray, start: int) -> int:
    """Return the index of the quote that ends the string beginning at `start`; the body's length if there is none.

    Escaped quotes are skipped only in the first AROUND_BYTES of the string, because base64 contains none.
    """
    end = body.find(b'"', start)
    while end >= 0 and end - start <= AROUND_BYTES and _is_escaped(body, start, end):
        end = body.find(b'"', end + 1)
    return end if end >= 0 else len(body)


def _is_escaped(body: bytes | bytearray, start: int, end: int) -> bool:
    """Return whether an odd number of backslashes precedes the quote at `end` in the string beginning at `start`."""
    first = end
    while first > start and body[first - 1] == BACKSLASH:
        first -= 1
    return (end - first) % 2 == 1


def _decoded(encoded: bytes | memoryview, *, is_escaped: bool) -> bytearray:
    """Decode base64 and return the bytes. is_escaped: it may contain JSON's escape sequences. Raises BadRequest."""
    # The array grows piece by piece, because filling 100 MiB with zeros in one call would hold the GIL for too long.
    data, left, padding = bytearray(), b"", b""
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
    """Return what follows a prefix like `data:image/png;base64,`, which FileReader writes in browsers.

    Raises ValueError for a data URL that is not in base64.
    """
    begin, view = bytes(encoded[:URL_PREFIX_BYTES]), memoryview(encoded)
    if not begin.lower().startswith(b"data:"):
        return view
    prefix, comma, _ = begin.partition(b",")
    if not comma or not prefix.lower().endswith(b";base64"):
        raise ValueError
    return view[len(prefix) + 1 :]


def _plain_pieces(encoded: memoryview, is_escaped: bool) -> Iterator[bytes]:
    """Yield the base64 in pieces, in the standard alphabet and without white space. Raises ValueError."""
    held = b""  # the beginning of an escape sequence that may end in the next piece
    for start in range(0, len(encoded), PIECE_BYTES):
        piece = held + bytes(encoded[start : start + PIECE_BYTES])
        held = b""
        if is_escaped and b"\\" in piece:
            whole = piece.rfind(b"\\", len(piece) - 5)
            if whole >= 0 and start + PIECE_BYTES < len(encoded):
                piece, held = piece[:whole], piece[whole:]
            piece = json.loads(b'"' + piece + b'"', strict=False).encode()
        yield piece.translate(TO_STANDARD, delete=b" \t\r\n\v\f")
