"""Choose the format of an answer by `Accept` and `output_type`."""

from __future__ import annotations

import re
from itertools import chain, groupby

from ..errors import NotAcceptable
from ..model_info import Kind
from ..outputs import FORMATS, Format
from .parameters import DECIMAL, Parameters

FRAGMENTED = re.compile(r"video/mp4\s*;\s*profile=\"?fragmented\"?", re.I)
MOST_TYPES = 64  # media types of an `Accept` header that are read; the rest is ignored


def choose_format(parameters: Parameters, output_type: str, accept: str, kind: Kind) -> tuple[Format, str]:
    """Return the format of the answer, and the media type to send with it.

    parameters: `image_format` is read if `output_type` is pil and `kind` is image.
    output_type: one of OUTPUT_TYPES.
    accept: the `Accept` header; an empty one accepts everything.
    kind: what the answer holds.

    Raises NotAcceptable if no format fits, BadRequest for an unknown `image_format`.
    """
    usual = [entry for entry in FORMATS if output_type in entry.output_types and kind in entry.kinds]
    named = [entry for entry in FORMATS if output_type in entry.when_named and kind in entry.kinds]
    if output_type == "pil" and kind == "image":
        names = [name for entry in usual for name in entry.names]
        first = parameters.word("image_format", names) or names[0]
        usual.sort(key=lambda entry: first not in entry.names)
    preferences, refused = _preferences(accept)
    for wanted in chain.from_iterable(map(_usual_first, preferences)):
        for entry in (*usual, *named):
            for media_type in entry.media_types:
                if media_type in refused:
                    continue
                is_match = wanted == media_type or wanted == media_type.split("/")[0] + "/*"
                if is_match or (wanted == "*/*" and entry in usual):
                    return entry, media_type
    raise NotAcceptable(_no_format(output_type, kind, [*usual, *named]))


def asks_for_stream(parameters: Parameters, accept: str) -> bool:
    """Return whether the answer is to be sent while it is computed: `stream=True`, or a profile in `Accept`."""
    return parameters.flag("stream") or FRAGMENTED.search(accept) is not None


def _no_format(output_type: str, kind: Kind, possible: list[Format]) -> str:
    types = ", ".join(media_type for entry in possible for media_type in entry.media_types)
    if kind == "audio" and output_type in ("pil", "mp4"):
        return "this model decodes audio; send output_type=wav, flac or pt"
    if kind != "audio" and output_type in ("wav", "flac"):
        others = "pil or pt" if kind == "image" else "mp4 or pt"
        return f"this model decodes {kind}s, not audio; send output_type={others}"
    if kind == "video" and output_type == "pil":
        return (
            "this model decodes videos, and an image format cannot hold a video; "
            f"send output_type=mp4 or pt, or Accept: {types}"
        )
    if kind == "image" and output_type == "mp4":
        return "this model decodes images, not videos; send output_type=pil or pt"
    return f"Accept names no media type that this request can be answered with; send one of {types}"


def _usual_first(equals: list[str]) -> list[str]:
    """Return media types of equal preference, with those that HTTP libraries send by default moved to the end.

    axios sends `application/json, text/plain, */*` with every request; such a client expects what `*/*` gives.
    """
    if "application/json" not in equals:
        return equals
    libraries = [wanted for wanted in ("text/plain", "application/json") if wanted in equals]
    return [wanted for wanted in equals if wanted not in libraries] + libraries


def _preferences(accept: str) -> tuple[list[list[str]], set[str]]:
    """Return the media types that an `Accept` header accepts, and those that it refuses with q=0.

    The accepted types are grouped: types of equal preference are in one list, in the order of the header, and the lists
    are in the order of preference. `q` is the only parameter of a media type that is read.
    """
    ranked: list[tuple[float, str]] = []
    for part in dict.fromkeys((accept.strip() or "*/*").split(",")[:MOST_TYPES]):
        media_type, *rest = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in rest if piece.startswith("q=")), "1")
        quality = float(weight) if DECIMAL.fullmatch(weight) else 0.0
        if media_type:
            ranked.append((quality, media_type))
    by_quality = sorted((pair for pair in ranked if pair[0] > 0), key=lambda pair: -pair[0])
    levels = groupby(by_quality, key=lambda pair: pair[0])
    wanted = [[media_type for _, media_type in level] for _, level in levels]
    return wanted, {media_type for quality, media_type in ranked if quality <= 0}
