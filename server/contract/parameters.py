"""Read the parameters of a request, in the spellings that clients use in the query or in a JSON body."""

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
            "decode_steps",
            "fps",
            "quality",
        ),
        *("sample", "seed", "output_dtype", "rotate", "posterior"),
    )
)
NOT_SENT = frozenset({"", "none", "null"})
MAX_DIMENSIONS = 5

# Numbers are checked before int() and float() see them, because those also accept `1_0`, `٣` and thousands of digits.
LONG = re.compile(r"[0-9]{1,20}", re.ASCII)
INTEGER = re.compile(r"[0-9]{1,6}", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", re.ASCII)

SHAPE_KEY = re.compile(r"shape\[([0-9]?)\]", re.ASCII)  # for `shape[]=1&shape[]=4` and `shape[0]=1&shape[1]=4`

Pairs = Iterable[tuple[str, str]]


class Parameters:
    """The parameters of one request. Each is parsed when its method is called. Unknown parameters are ignored.

    A parameter counts as not sent if its value is empty, `none` or `null`. Every method that parses a value raises
    BadRequest if the value is wrong.
    """

    def __init__(self, query: Pairs, body: Mapping[str, Any] | None = None) -> None:
        """Keep the parameters. Raises BadRequest for a value that no parameter can have.

        query: keys and values; a key may be repeated.
        body: the `parameters` of a JSON body. A parameter that is also in the query is taken from the query.
        """
        self._values: dict[str, list[str]] = {}
        self._is_from_comfyui = False
        for key, value in _with_plain_shape(query):
            self._values.setdefault(key, []).append(value)
        for key, value in (body or {}).items():
            if key in KNOWN:
                self._values.setdefault(key, _as_texts(key, value))

    def of_tensor(self, shape: tuple[int, ...], dtype: str, *, is_from_comfyui: bool) -> Parameters:
        """Return a copy with the shape and the dtype of a file's tensor.

        is_from_comfyui: the latents are those of a ComfyUI .latent file. The model's family knows whether they are
            scaled, so `do_scaling` is ignored.

        Raises BadRequest if another dtype was sent, or scaling factors for a ComfyUI .latent file.
        """
        sent = self.text("dtype")
        if sent is not None and sent.lower().removeprefix("torch.") != dtype:
            raise BadRequest(f"dtype={_quoted(sent)} was sent, but the file's tensor is {dtype}; leave dtype out")
        found = Parameters(())
        found._values = {**self._values, "shape": list(map(str, shape)), "dtype": [dtype]}
        if is_from_comfyui:
            if self.has("scaling_factor") or self.has("shift_factor"):
                raise BadRequest(
                    "the server knows how the latents of a ComfyUI .latent file are scaled; "
                    "leave scaling_factor and shift_factor out"
                )
            found._is_from_comfyui = True
        return found

    def of_sound(self, shape: tuple[int, ...], dtype: str) -> Parameters:
        """Return the parameters to decode the sound of a video: the tensor's, and `do_scaling`."""
        found = Parameters(())
        found._values = {"shape": list(map(str, shape)), "dtype": [dtype], "output_type": ["wav"]}
        if self.has("do_scaling"):
            found._values["do_scaling"] = self._values["do_scaling"]
        return found

    def text(self, key: str) -> str | None:
        """Return the value of a parameter; None if it was not sent. Raises BadRequest if it has several values."""
        values = {value.strip() for value in self._values.get(key, [])}
        values = {value for value in values if value.lower() not in NOT_SENT}
        if len(values) > 1:
            raise BadRequest(f"{key} was sent {len(values)} times with different values; send it once")
        return values.pop() if values else None

    def has(self, key: str) -> bool:
        """Return whether a parameter was sent."""
        return any(value.strip().lower() not in NOT_SENT for value in self._values.get(key, []))

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a boolean, sent as True, False, 1 or 0 in any case."""
        text = self.text(key)
        match (text or str(default)).lower():
            case "true" | "1":
                return True
            case "false" | "0":
                return False
        raise BadRequest(f"{key} must be True or False, not {_quoted(text)}")

    def number(self, key: str, low: float, high: float) -> float | None:
        """Return a finite decimal number from `low` to `high`, both included; None if it was not sent."""
        text = self.text(key)
        if text is None:
            return None
        if not DECIMAL.fullmatch(text) or not isfinite(value := float(text)):
            raise BadRequest(f"{key} must be a finite decimal number, not {_quoted(text)}")
        if not low <= value <= high:
            raise BadRequest(f"{key} must be between {low:g} and {high:g}, not {value:g}")
        return value

    def integer(self, key: str) -> int | None:
        """Return a whole number of at most 6 digits, without a sign; None if it was not sent."""
        text = self.text(key)
        if text is not None and not INTEGER.fullmatch(text):
            raise BadRequest(f"{key} must be a whole number of at most 6 digits, not {_quoted(text)}")
        return int(text) if text else None

    def long(self, key: str) -> int | None:
        """Return a whole number from 0 to 2**64 - 1, the range of torch's seeds; None if it was not sent."""
        text = self.text(key)
        if text is not None and not (LONG.fullmatch(text) and int(text) < 1 << 64):
            raise BadRequest(f"{key} must be a whole number from 0 to 2**64 - 1, not {_quoted(text)}")
        return int(text) if text else None

    def word(self, key: str, known: Iterable[str]) -> str | None:
        """Return one of the `known` words, in lower case; None if it was not sent."""
        text = self.text(key)
        if text is not None and text.lower() not in known:
            raise BadRequest(f"{key} must be one of {', '.join(known)}, not {_quoted(text)}")
        return text.lower() if text else None

    def shape(self) -> tuple[int, ...]:
        """Return the shape, which must have been sent, with 1 to MAX_DIMENSIONS dimensions of 1 to 999999.

        Clients write `shape=1&shape=4…`, as `requests` does for a list, or one JSON list, or `1,4,64,64`.
        """
        sent = self._values.get("shape", [])
        if len(sent) == 1:
            sent = sent[0].strip().removeprefix("[").removesuffix("]").split(",")
        sent = [text.strip() for text in sent]
        if not any(sent):
            raise BadRequest(
                "shape is missing: send the tensor's dimensions, for example shape=1&shape=4&shape=64&shape=64, or "
                "send a whole .safetensors file; a PNG, JPEG, WebP or MP4 file is encoded, here and at /encode"
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
        """Return a dtype, which must have been sent, without the prefix `torch.`.

        known: the possible dtypes. of: the name of the data, for the error. key: the name of the parameter.
        """
        text = self.text(key)
        if text is None:
            raise BadRequest(f"{key} is missing: send one of {', '.join(known)}")
        name = text.lower().removeprefix("torch.")
        if name not in known:
            raise BadRequest(f"{key} of {of} must be one of {', '.join(known)}, not {_quoted(text)}")
        return name

    def output_dtype(self) -> str | None:
        """Return the dtype of a float tensor in the answer; None if it was not sent."""
        return self.dtype(of="the answer", key="output_dtype") if self.has("output_dtype") else None

    def scaling(self) -> Scaling:
        """Return `scaling_factor`, `shift_factor` and `do_scaling`. A scaling factor below 1e-6 is an error."""
        if self._is_from_comfyui:
            return Scaling(is_from_comfyui=True)
        factor = self.number("scaling_factor", -1e6, 1e6)
        if factor is not None and abs(factor) < 1e-6:
            raise BadRequest(
                f"scaling_factor must not be zero or between -1e-6 and 1e-6, but it is {factor:g}; "
                "send the factor by which the latents are scaled"
            )
        return Scaling(factor, self.number("shift_factor", -1e6, 1e6), self.flag("do_scaling"))

    def pixel_size(self) -> tuple[int, int] | None:
        """Return `height` and `width` in pixels; None unless both were sent and are not 0.

        Call it only for packed latents, because for others clients may send anything here.
        """
        height, width = self.integer("height"), self.integer("width")
        return (height, width) if height and width else None


def _with_plain_shape(query: Pairs) -> Iterator[tuple[str, str]]:
    """Yield the query with `shape[]` and `shape[0]`, which is how axios and qs write lists, renamed to `shape`.

    Raises BadRequest for `shape[N]` with gaps or repetitions.
    """
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
        raise BadRequest("shape[0], shape[1], … must each be sent once, without gaps; or send shape=1&shape=4…")
    yield from (("shape", spelt[place][0]) for place in places)


def _as_texts(key: str, value: Any) -> list[str]:
    """Return the values that the query would have for a JSON value. Raises BadRequest."""
    match value:
        case None:
            return []
        case list() if len(value) > MAX_DIMENSIONS:
            raise BadRequest(f"parameters.{key} is a list of {len(value)}; lists have at most {MAX_DIMENSIONS} values")
        case list() if all(isinstance(item, int | float | str) for item in value):
            return [_as_text(item) for item in value]
        case bool() | int() | float() | str():
            return [_as_text(value)]
    raise BadRequest(f"parameters.{key[:40]!a} must be a number, a string, a boolean or a list of numbers")


def _as_text(value: float | str) -> str:
    """Return a JSON scalar as text. 64.0 becomes "64", because some clients write whole numbers as floats."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e9
    return str(int(value)) if is_whole else str(value)


def _quoted(text: str | None) -> str:
    """Return a client's value for an error sentence: at most 40 characters, in one line of printable ASCII."""
    shown = ascii((text or "")[:40])
    return shown + ("…" if text and len(text) > 40 else "")


def patience_s(header: str | None) -> float | None:
    """Return the deadline that a client sets with `X-Request-Timeout`, in seconds; None without the header.

    Raises BadRequest unless it is a number from 0.001 to 1e6.
    """
    return Parameters([("X-Request-Timeout", header)] if header else []).number("X-Request-Timeout", 0.001, 1e6)
