"""The parameters of a request, as clients spell them in the query or in a JSON body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

from ..errors import BadRequest
from ..values import LATENT_DTYPES, Scaling

KNOWN = frozenset(
    (
        *("shape", "dtype", "model", "scaling_factor", "shift_factor", "do_scaling", "output_type", "image_format"),
        *(
            "partial_postprocess",
            "height",
            "width",
            "num_frames",
            "decode_timestep",
            "decode_chunk_size",
            "fps",
            "quality",
        ),
        *("sample", "seed", "output_dtype", "rotate"),
    )
)
NOT_SENT = frozenset({"", "none", "null"})
MAX_DIMENSIONS = 5

# ASCII digits only: Python's int() and float() also take `1_0`, `٣` and five thousand digits.
LONG = re.compile(r"[0-9]{1,20}", re.ASCII)
INTEGER = re.compile(r"[0-9]{1,6}", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", re.ASCII)

SHAPE_KEY = re.compile(r"shape\[([0-9]?)\]", re.ASCII)  # `shape[]=1&shape[]=4`, `shape[0]=1&shape[1]=4`

Pairs = Iterable[tuple[str, str]]


class Parameters:
    """The parameters of one request as they were sent, each read when it is asked for. Unknown ones are ignored."""

    def __init__(self, query: Pairs, body: Mapping[str, Any] | None = None) -> None:
        """query: repeated keys allowed. body: a JSON body's `parameters`, used where the query is silent."""
        self._values: dict[str, list[str]] = {}
        for key, value in _with_plain_shape(query):
            self._values.setdefault(key, []).append(value)
        for key, value in (body or {}).items():
            if key in KNOWN:
                self._values.setdefault(key, _as_texts(key, value))

    def of_tensor(self, shape: tuple[int, ...], dtype: str, *, is_unscaled: bool) -> Parameters:
        """Return these with the shape and the dtype that a file says, and without `do_scaling` where it is unscaled.

        Raises BadRequest where another dtype was sent, or factors for latents that are unscaled.
        """
        sent = self.text("dtype")
        if sent is not None and sent.lower().removeprefix("torch.") != dtype:
            raise BadRequest(f"dtype={_quoted(sent)} was sent, the file's tensor is {dtype}; leave dtype out")
        found = Parameters(())
        found._values = {**self._values, "shape": list(map(str, shape)), "dtype": [dtype]}
        if is_unscaled:
            if self.has("scaling_factor") or self.has("shift_factor"):
                raise BadRequest(
                    "a .latent file of ComfyUI is already unscaled; leave scaling_factor and shift_factor out"
                )
            found._values.pop("do_scaling", None)
        return found

    def text(self, key: str) -> str | None:
        """One value, None when it was not sent. A scalar sent twice with different values is an error."""
        values = {value.strip() for value in self._values.get(key, [])}
        values = {value for value in values if value.lower() not in NOT_SENT}
        if len(values) > 1:
            raise BadRequest(f"{key} was sent {len(values)} times with different values; send it once")
        return values.pop() if values else None

    def has(self, key: str) -> bool:
        return any(value.strip().lower() not in NOT_SENT for value in self._values.get(key, []))

    def flag(self, key: str, *, default: bool = False) -> bool:
        text = self.text(key)
        match (text or str(default)).lower():
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

    def long(self, key: str) -> int | None:
        """As large as torch's seeds."""
        text = self.text(key)
        if text is not None and not (LONG.fullmatch(text) and int(text) < 1 << 64):
            raise BadRequest(f"{key} must be a whole number below 2 to the 64, not {_quoted(text)}")
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
                "shape is missing: send the tensor's dimensions, for example shape=1&shape=4&shape=64&shape=64, or a "
                "whole .safetensors file; a PNG, JPEG, WebP or MP4 file is encoded, here and at /encode"
            )
        if len(sent) > MAX_DIMENSIONS:
            raise BadRequest(
                f"shape has {len(sent)} dimensions; tensors have at most {MAX_DIMENSIONS}: is there an axis too many?"
            )
        wrong = next((text for text in sent if not INTEGER.fullmatch(text) or int(text) == 0), None)
        if wrong is not None:
            raise BadRequest(f"shape must hold whole numbers from 1 to 999999, not {_quoted(wrong)}")
        return tuple(map(int, sent))

    def dtype(self, known: tuple[str, ...] = LATENT_DTYPES, of: str = "latents", key: str = "dtype") -> str:
        text = self.text(key)
        if text is None:
            raise BadRequest(f"{key} is missing: send one of {', '.join(known)}")
        name = text.lower().removeprefix("torch.")
        if name not in known:
            raise BadRequest(f"{key} of {of} must be one of {', '.join(known)}, not {_quoted(text)}")
        return name

    def output_dtype(self) -> str | None:
        """Return the dtype of a float answer, None when it was not sent."""
        return self.dtype(of="the answer", key="output_dtype") if self.has("output_dtype") else None

    def scaling(self) -> Scaling:
        factor = self.number("scaling_factor", -1e6, 1e6)
        if factor is not None and abs(factor) < 1e-6:
            raise BadRequest(f"scaling_factor must not be zero or nearly so, not {factor:g}: latents are scaled by it")
        return Scaling(factor, self.number("shift_factor", -1e6, 1e6), self.flag("do_scaling"))

    def pixel_size(self) -> tuple[int, int] | None:
        """Height and width, wanted for packed latents alone; other clients send nonsense here."""
        height, width = self.integer("height"), self.integer("width")
        return (height, width) if height and width else None


def _with_plain_shape(query: Pairs) -> Iterator[tuple[str, str]]:
    """The query with `shape[]` and `shape[0]`, as axios and qs write lists, as `shape`. Raises BadRequest."""
    spelt: dict[str, list[str]] = {}
    for key, value in query:
        found = SHAPE_KEY.fullmatch(key)
        if found is None:
            yield key, value
        else:
            spelt.setdefault(found[1], []).append(value)
    places = sorted(spelt)
    if not places or places == [""]:
        yield from (("shape", value) for value in spelt.get("", ()))
        return
    if places != [str(n) for n in range(len(places))] or any(len(values) > 1 for values in spelt.values()):
        raise BadRequest("shape[0], shape[1] … must each be sent once, without gaps; or send shape=1&shape=4…")
    yield from (("shape", spelt[place][0]) for place in places)


def _as_texts(key: str, value: Any) -> list[str]:
    """A JSON value as the query would spell it."""
    match value:
        case None:
            return []
        case list() if len(value) > MAX_DIMENSIONS:
            raise BadRequest(f"parameters.{key} is a list of {len(value)}; lists have at most {MAX_DIMENSIONS} values")
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


def patience_s(header: str | None) -> float | None:
    """`X-Request-Timeout`, the seconds after which the client wants no answer any more. Raises BadRequest."""
    return Parameters([("X-Request-Timeout", header)] if header else []).number("X-Request-Timeout", 0.001, 1e6)
