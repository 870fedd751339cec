"""`Accept` and `output_type` to one of the FORMATS."""

from __future__ import annotations

from itertools import chain, groupby

from ..errors import NotAcceptable
from ..model_info import Kind
from ..outputs import FORMATS, Format
from .parameters import DECIMAL, Parameters

MOST_TYPES = 64  # of an `Accept` header that are read


def choose_format(parameters: Parameters, output_type: str, accept: str, kind: Kind) -> tuple[Format, str]:
    """`Accept` and `output_type` to a format and the media type to answer with. Raises NotAcceptable, BadRequest."""
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


def _no_format(output_type: str, kind: Kind, possible: list[Format]) -> str:
    types = ", ".join(media_type for entry in possible for media_type in entry.media_types)
    if kind == "video" and output_type == "pil":
        return (
            f"this model decodes videos, which no picture format holds; use output_type=mp4 or pt, or Accept: {types}"
        )
    if kind == "image" and output_type == "mp4":
        return "this model decodes pictures, not videos; use output_type=pil or pt"
    return f"no representation of output_type={output_type} that Accept asks for; send one of {types}"


def _usual_first(equals: list[str]) -> list[str]:
    """Media types of equal preference, with what HTTP libraries always ask for last.

    axios sends `application/json, text/plain, */*` with every request, and means what `*/*` gives.
    """
    if "application/json" not in equals:
        return equals
    libraries = [wanted for wanted in ("text/plain", "application/json") if wanted in equals]
    return [wanted for wanted in equals if wanted not in libraries] + libraries


def _preferences(accept: str) -> tuple[list[list[str]], set[str]]:
    """Return the media types of an `Accept` header, and those refused with q=0; of their parameters only `q` is read.

    Types of equal preference are in one list, in their order; the lists are in the order of preference.
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
