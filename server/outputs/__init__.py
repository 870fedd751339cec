"""Pixels and tensors to bytes. A new output is one render function and one line in `FORMATS`.

Which representation answers a request is read off that table; nothing else in the server names a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..model_info import Kind
from ..values import RawTensor, Rendered, RenderOptions
from .image import render_jpeg, render_png
from .tensor import render_base64, render_binary
from .video import render_mp4, render_mp4_frames


@dataclass(frozen=True, slots=True)
class Format:
    """One representation.

    names: what `image_format` calls it. media_types: what `Accept` calls it, the usual one first.
    output_types: the values of `output_type` it answers when `Accept` leaves the choice (`*/*`).
    when_named: those it answers only when `Accept` names it.
    is_encoded: made of uint8 pixels, one picture or clip a response.
    quality: the range of the query's `quality`, None where it has none.
    max_side: the most pixels in a row or column that the format holds.
    render_frames: renders a clip that comes in chunks of frames, for formats that need not wait for all of it.
    """

    names: tuple[str, ...]
    media_types: tuple[str, ...]
    kinds: frozenset[Kind]
    output_types: frozenset[str]
    render: Callable[[RawTensor, RenderOptions], Rendered]
    when_named: frozenset[str] = frozenset()
    is_encoded: bool = True
    quality: tuple[float, float] | None = None
    max_side: int | None = None
    render_frames: Callable[[Iterable[RawTensor], RenderOptions], Rendered] | None = None


IMAGE: frozenset[Kind] = frozenset({"image"})
VIDEO: frozenset[Kind] = frozenset({"video"})
PIL, PT, MP4 = frozenset({"pil"}), frozenset({"pt"}), frozenset({"mp4"})

FORMATS: list[Format] = [
    Format(("jpg", "jpeg"), ("image/jpeg",), IMAGE, PIL, render_jpeg, quality=(1, 100), max_side=65500),
    Format(("png",), ("image/png",), IMAGE, PIL, render_png),
    Format(
        ("mp4",),
        ("video/mp4", "text/plain"),
        VIDEO,
        MP4,
        render_mp4,
        quality=(1, 10),
        max_side=16384,
        render_frames=render_mp4_frames,
    ),
    Format(("binary",), ("tensor/binary", "application/octet-stream"), IMAGE | VIDEO, PT, render_binary, PIL, False),
    Format(("base64",), ("tensor/base64", "application/json"), IMAGE | VIDEO, PT, render_base64, PIL, False),
]

OUTPUT_TYPES = ("pil", "pt", "mp4")


def format_named(name: str) -> Format:
    """The format that a job carries by name."""
    return next(entry for entry in FORMATS if name in entry.names)


__all__ = ["FORMATS", "OUTPUT_TYPES", "Format", "format_named"]
