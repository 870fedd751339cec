"""Render pixels and tensors as bytes.

To add an output, write a render function and add one line to `FORMATS`. The server chooses the representation of an
answer from that table; no other code names a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..model_info import Kind
from ..values import RawTensor, Rendered, RenderOptions
from .audio import render_flac, render_wav
from .image import render_jpeg, render_png
from .tensor import render_base64, render_binary
from .video import render_fragmented_mp4, render_mp4, render_mp4_frames, stream_mp4_frames, with_sound


@dataclass(frozen=True, slots=True)
class Format:
    """One representation of an answer.

    names: its names as values of `image_format`.
    media_types: its names in `Accept`, the most usual first.
    kinds: the kinds of model that it can represent.
    output_types: the values of `output_type` for which it is chosen when `Accept` does not decide (`*/*`).
    render: renders a whole tensor.
    when_named: further values of `output_type` for which it is chosen, but only if `Accept` names it.
    is_encoded: it is made from uint8 pixels, or from a waveform in float32, and a response holds only one image, video
        or waveform.
    quality: the range of the parameter `quality`; None if the format has no quality.
    max_side: the most pixels that a row or column can have in this format; None if there is no limit.
    render_frames: renders a video while its chunks of frames are still decoded; None if the format needs all of them.
    stream_frames: yields the answer piece by piece, each to be sent at once; None if it is sent as a whole. Such a
        format is chosen only if the client asks for a stream.
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
    stream_frames: Callable[[Iterable[RawTensor], RenderOptions], Iterator[bytes]] | None = None


IMAGE: frozenset[Kind] = frozenset({"image"})
VIDEO: frozenset[Kind] = frozenset({"video"})
AUDIO: frozenset[Kind] = frozenset({"audio"})
PIL, PT, MP4, WAV, FLAC = (frozenset({name}) for name in ("pil", "pt", "mp4", "wav", "flac"))
ALL = IMAGE | VIDEO | AUDIO

STREAMED_MP4 = "fragmented-mp4"

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
    Format(
        (STREAMED_MP4,),
        ("video/mp4", "text/plain"),
        VIDEO,
        frozenset(),
        lambda pixels, options: render_fragmented_mp4([pixels], options),
        quality=(1, 10),
        max_side=16384,
        render_frames=render_fragmented_mp4,
        stream_frames=stream_mp4_frames,
    ),
    Format(("wav",), ("audio/wav", "audio/x-wav", "audio/vnd.wave"), AUDIO, WAV, render_wav, FLAC),
    Format(("flac",), ("audio/flac", "audio/x-flac"), AUDIO, FLAC, render_flac, WAV),
    Format(("binary",), ("tensor/binary", "application/octet-stream"), ALL, PT, render_binary, PIL | WAV | FLAC, False),
    Format(("base64",), ("tensor/base64", "application/json"), ALL, PT, render_base64, PIL | WAV | FLAC, False),
]

OUTPUT_TYPES = ("pil", "pt", "mp4", "wav", "flac")


def format_named(name: str) -> Format:
    """Return the format with this name, which must be in `FORMATS`."""
    return next(entry for entry in FORMATS if name in entry.names)


__all__ = ["FORMATS", "OUTPUT_TYPES", "STREAMED_MP4", "Format", "format_named", "with_sound"]
