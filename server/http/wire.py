"""The client's words: query parameters, bodies and `Accept`, to one VAERequest. The only file that knows them.

Every refusal that needs no tensor happens here or in the family's geometry, before a body is read where possible.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from server.errors import BadRequest, Impossible, NotAcceptable, UnsupportedBody, WrongLength
from server.families import FAMILIES, check_limits
from server.outputs import FORMATS, OUTPUT_TYPES, Format
from server.types import (
    Geometry,
    Kind,
    Layout,
    ModelInfo,
    RawTensor,
    RenderOptions,
    Scaling,
    VAEJob,
    VAERequest,
)

LATENT_DTYPES = ("float16", "bfloat16", "float32")
BINARY_BODIES = frozenset({"", "tensor/binary", "application/octet-stream"})
JSON_BODIES = frozenset({"tensor/base64", "application/json"})

# ASCII digits only: Python's int() and float() also take `1_0`, `٣` and five thousand digits.
INTEGER = re.compile(r"[0-9]{1,6}", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", re.ASCII)
KNOWN = frozenset({"shape", "dtype", "scaling_factor", "shift_factor", "do_scaling", "output_type", "image_format"}) | {
    *("partial_postprocess", "height", "width", "model", "fps", "quality")
}
# A pixel's, of three channels: raw samples and denormalized ones may be float32.
OUTPUT_BYTES = {Layout.SAMPLE: 12, Layout.UNIT: 12, Layout.PIXELS: 3}
NOT_SENT = frozenset({"", "none", "null"})
MAX_DIMENSIONS = 5

Pairs = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class RenderDefaults:
    """The server's settings that a request may override."""

    fps: float = 10
    jpeg_quality: float = 75
    video_quality: float = 5

    def quality_of(self, kind: Kind) -> float:
        return self.video_quality if kind == "video" else self.jpeg_quality


class Parameters:
    """The parameters of one request as they were sent, each read when it is asked for. Unknown ones are ignored."""

    def __init__(self, query: Pairs, body: Mapping[str, Any] | None = None) -> None:
        """query: repeated keys allowed. body: a JSON body's `parameters`, used where the query is silent."""
        self._values: dict[str, list[str]] = {}
        for key, value in query:
            self._values.setdefault(key, []).append(value)
        for key, value in (body or {}).items():
            if key in KNOWN:
                self._values.setdefault(key, _as_texts(key, value))

    def text(self, key: str) -> str | None:
        """One value, None when it was not sent. A scalar sent twice with different values is an error."""
        values = {value.strip() for value in self._values.get(key, [])}
        values = {value for value in values if value.lower() not in NOT_SENT}
        if len(values) > 1:
            raise BadRequest(f"{key} was sent {len(values)} times with different values; send it once")
        return values.pop() if values else None

    def flag(self, key: str) -> bool:
        text = self.text(key)
        match (text or "false").lower():
            case "true" | "1":
                return True
            case "false" | "0":
                return False
        raise BadRequest(f"{key} must be True or False, not {_quoted(text)}")

    def number(self, key: str, low: float, high: float) -> float | None:
        """A finite decimal number of magnitude within [low, high], or within the range when low is positive."""
        text = self.text(key)
        if text is None:
            return None
        if not DECIMAL.fullmatch(text) or not isfinite(value := float(text)):
            raise BadRequest(f"{key} must be a finite decimal number, not {_quoted(text)}")
        if not low <= value <= high:
            raise BadRequest(f"{key} must be between {low:g} and {high:g}, not {value:g}")
        return value

    def integer(self, key: str) -> int | None:
        text = self.text(key)
        if text is not None and not INTEGER.fullmatch(text):
            raise BadRequest(f"{key} must be a whole number of at most 6 digits, not {_quoted(text)}")
        return int(text) if text else None

    def word(self, key: str, known: Iterable[str]) -> str | None:
        text = self.text(key)
        if text is not None and text.lower() not in known:
            raise BadRequest(f"{key} must be one of {', '.join(known)}, not {_quoted(text)}")
        return text.lower() if text else None

    def shape(self) -> tuple[int, ...]:
        """`shape=1&shape=4…` as `requests` writes a list, or one JSON list, or `1,4,64,64`."""
        sent = self._values.get("shape", [])
        if len(sent) == 1:
            sent = sent[0].strip().removeprefix("[").removesuffix("]").split(",")
        sent = [text.strip() for text in sent]
        if not any(sent):
            raise BadRequest(
                "shape is missing: send the tensor's dimensions, for example shape=1&shape=4&shape=64&shape=64"
            )
        if len(sent) > MAX_DIMENSIONS:
            raise BadRequest(f"shape has {len(sent)} dimensions; latents have at most {MAX_DIMENSIONS}")
        wrong = next((text for text in sent if not INTEGER.fullmatch(text) or int(text) == 0), None)
        if wrong is not None:
            raise BadRequest(f"shape must hold whole numbers from 1 to 999999, not {_quoted(wrong)}")
        return tuple(map(int, sent))

    def dtype(self) -> str:
        text = self.text("dtype")
        if text is None:
            raise BadRequest(f"dtype is missing: send one of {', '.join(LATENT_DTYPES)}")
        name = text.lower().removeprefix("torch.")
        if name not in LATENT_DTYPES:
            raise BadRequest(f"dtype of latents must be one of {', '.join(LATENT_DTYPES)}, not {_quoted(text)}")
        return name

    def scaling(self) -> Scaling:
        factor = self.number("scaling_factor", -1e6, 1e6)
        if factor is not None and abs(factor) < 1e-6:
            raise BadRequest(
                f"scaling_factor must not be zero or nearly so, not {factor:g}: the latents are divided by it"
            )
        return Scaling(factor, self.number("shift_factor", -1e6, 1e6), self.flag("do_scaling"))

    def pixel_size(self) -> tuple[int, int] | None:
        """Height and width, wanted for packed latents alone; other clients send nonsense here."""
        height, width = self.integer("height"), self.integer("width")
        return (height, width) if height and width else None


def _as_texts(key: str, value: Any) -> list[str]:
    """A JSON value as the query would spell it."""
    match value:
        case None:
            return []
        case list() if all(isinstance(item, int | float | str) for item in value):
            return [_as_text(item) for item in value]
        case bool() | int() | float() | str():
            return [_as_text(value)]
    raise BadRequest(f"parameters.{key[:40]!a} must be a number, a text, a boolean or a list of numbers")


def _as_text(value: float | str) -> str:
    """JavaScript writes whole numbers either way: 64.0 is 64."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e9
    return str(int(value)) if is_whole else str(value)


def _quoted(text: str | None) -> str:
    """A client's word in a sentence: short, one line, printable ASCII."""
    shown = ascii((text or "")[:40])
    return shown + ("…" if text and len(text) > 40 else "")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is accepted but for its bytes."""

    model: str
    shape: tuple[int, ...]
    dtype: str
    geometry: Geometry
    scaling: Scaling
    layout: Layout
    format: str
    render: RenderOptions

    @property
    def bytes_needed(self) -> int:
        return RawTensor.bytes_needed(self.shape, self.dtype)

    @property
    def bytes_held(self) -> int:
        """Of the request and, at most, its answer."""
        return self.bytes_needed + self.geometry.pixels * OUTPUT_BYTES[self.layout]

    def check_length(self, found: int) -> None:
        """Raises WrongLength, with a guess at the mistake."""
        if found == self.bytes_needed:
            return
        others = [name for name in LATENT_DTYPES if RawTensor.bytes_needed(self.shape, name) == found]
        guess = f"was dtype={' or '.join(others)} meant?" if others else "check shape and dtype"
        shape = "x".join(map(str, self.shape))
        raise WrongLength(
            f"shape {shape} of {self.dtype} needs {self.bytes_needed} bytes, the body has {found}; {guess}"
        )

    def with_data(self, data: bytes | bytearray) -> VAERequest:
        """Raises WrongLength."""
        self.check_length(len(data))
        tensor = RawTensor(self.shape, self.dtype, memoryview(data))
        job = VAEJob(self.model, tensor, self.geometry, self.scaling, self.layout)
        return VAERequest(job, self.format, self.render)


def prepare(parameters: Parameters, accept: str, info: ModelInfo, defaults: RenderDefaults) -> Prepared:
    """Check everything but the bytes against the model.

    Raises BadRequest, WrongShape, TooLarge, NotAcceptable, Impossible.
    """
    shape, dtype, scaling = parameters.shape(), parameters.dtype(), parameters.scaling()
    output_type = parameters.word("output_type", OUTPUT_TYPES) or "pil"
    is_partial = parameters.flag("partial_postprocess")
    chosen, media_type = choose_format(parameters, output_type, accept, info.latents.kind)
    family = FAMILIES[info.latents.family]
    geometry = family.geometry(info.latents, shape, parameters.pixel_size)
    check_limits(geometry, info.limits, info.name)
    layout = _layout(chosen, output_type, is_partial)
    _check_fits(geometry, chosen, layout, info.latents.kind)
    return Prepared(
        model=info.name,
        shape=shape,
        dtype=dtype,
        geometry=geometry,
        scaling=scaling,
        layout=layout,
        format=chosen.names[0],
        render=RenderOptions(
            fps=parameters.number("fps", 0.1, 240) or defaults.fps,
            quality=_quality(parameters, chosen, defaults.quality_of(info.latents.kind)),
            media_type=media_type,
        ),
    )


def _quality(parameters: Parameters, chosen: Format, default: float) -> float | None:
    return chosen.quality and (parameters.number("quality", *chosen.quality) or default)


def _layout(chosen: Format, output_type: str, is_partial: bool) -> Layout:
    if chosen.is_encoded or (output_type == "pt" and is_partial):
        return Layout.PIXELS
    return Layout.UNIT if output_type == "pil" else Layout.SAMPLE


def _check_fits(geometry: Geometry, chosen: Format, layout: Layout, kind: Kind) -> None:
    """One picture or one clip in an encoded answer, of a size it holds; one clip where frames are the first axis."""
    longest = max(geometry.height, geometry.width)
    if chosen.max_side is not None and longest > chosen.max_side:
        raise Impossible(
            f"{geometry.height}x{geometry.width} does not fit a {chosen.names[0].upper()}, whose sides are at most "
            f"{chosen.max_side} pixels; ask for output_type=pt"
        )
    if geometry.batch == 1 or layout is Layout.SAMPLE or (kind == "image" and not chosen.is_encoded):
        return
    what = f"one {chosen.names[0].upper()}" if chosen.is_encoded else "one tensor of frames"
    raise Impossible(
        f"a batch of {geometry.batch} does not fit {what}; ask for output_type=pt, or send one request each"
    )


def choose_format(parameters: Parameters, output_type: str, accept: str, kind: Kind) -> tuple[Format, str]:
    """`Accept` and `output_type` to a format and the media type to answer with. Raises NotAcceptable, BadRequest."""
    usual = [entry for entry in FORMATS if output_type in entry.output_types and kind in entry.kinds]
    named = [entry for entry in FORMATS if output_type in entry.when_named and kind in entry.kinds]
    if output_type == "pil" and kind == "image":
        names = [name for entry in usual for name in entry.names]
        first = parameters.word("image_format", names) or names[0]
        usual.sort(key=lambda entry: first not in entry.names)
    preferences, refused = _preferences(accept)
    for wanted in preferences:
        for entry in (*usual, *named):
            for media_type in entry.media_types:
                if media_type in refused:
                    continue
                is_match = wanted == media_type or wanted == media_type.split("/")[0] + "/*"
                if is_match or (wanted == "*/*" and entry in usual):
                    return entry, media_type
    raise NotAcceptable(_no_format(output_type, kind, [*usual, *named]))


def _no_format(output_type: str, kind: Kind, possible: list[Format]) -> str:
    types = ", ".join(media_type for entry in possible for media_type in entry.media_types)
    if kind == "video" and output_type == "pil":
        return (
            f"this model decodes videos, which no picture format holds; use output_type=mp4 or pt, or Accept: {types}"
        )
    if kind == "image" and output_type == "mp4":
        return "this model decodes pictures, not videos; use output_type=pil or pt"
    return f"no representation of output_type={output_type} that Accept asks for; send one of {types}"


def _preferences(accept: str) -> tuple[list[str], set[str]]:
    """The media types of an `Accept` header, the most wanted first, and those refused with q=0; `q` alone is read."""
    ranked: list[tuple[float, str]] = []
    for part in (accept.strip() or "*/*").split(","):
        media_type, *rest = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in rest if piece.startswith("q=")), "1")
        quality = float(weight) if DECIMAL.fullmatch(weight) else 0.0
        if media_type:
            ranked.append((quality, media_type))
    wanted = [media_type for quality, media_type in sorted(ranked, key=lambda pair: -pair[0]) if quality > 0]
    return wanted, {media_type for quality, media_type in ranked if quality <= 0}


def patience_s(header: str | None) -> float | None:
    """`X-Request-Timeout`, the seconds after which the client wants no answer any more. Raises BadRequest."""
    return Parameters([("X-Request-Timeout", header)] if header else []).number("X-Request-Timeout", 0.001, 1e6)


def is_json_body(content_type: str | None, content_encoding: str | None) -> bool:
    """Whether the body is JSON with base64 in it, or the tensor's own bytes. Raises UnsupportedBody."""
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise UnsupportedBody("compressed bodies are not read; send the tensor's bytes without Content-Encoding")
    media_type = (content_type or "").split(";")[0].strip().lower()
    if media_type in JSON_BODIES:
        return True
    if media_type in BINARY_BODIES:
        return False
    known = ", ".join(sorted((BINARY_BODIES | JSON_BODIES) - {""}))
    raise UnsupportedBody(f"the body's Content-Type is not one of {known}; send tensor/binary and the tensor's bytes")


def read_json(body: bytes | bytearray) -> tuple[bytes, Mapping[str, Any]]:
    """`{"inputs": "<base64>", "parameters": {…}}` to the tensor's bytes and the parameters. Raises BadRequest."""
    expected = 'expected {"inputs": "<base64 of the tensor>", "parameters": {…}}'
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
        raise BadRequest("'inputs' is not base64; send base64.b64encode of the tensor's bytes") from None
