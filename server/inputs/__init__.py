"""Pictures and clips to pixels, for encoding. The first bytes say what a file is; its header is checked first."""

from __future__ import annotations

from dataclasses import dataclass

from server.inputs.image import picture_size, read_picture, resized
from server.inputs.video import clip_size, read_clip
from server.types import RawTensor

VIDEO_TYPE = "video/mp4"
STILLS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"})  # pictures in such a box


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    media_type: str
    frames: int
    height: int
    width: int


def media_type_of(data: bytes | bytearray | memoryview) -> str | None:
    """`image/png`, `image/jpeg`, `image/webp`, `video/mp4`, or None."""
    head = bytes(data[:12])
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "image/webp"
    return VIDEO_TYPE if head[4:8] == b"ftyp" and head[8:] not in STILLS else None


def read_header(data: bytes | bytearray, media_type: str, max_frames: int) -> Header:
    """Before anything is decoded; of a clip's frames no more than one too many are counted.

    Raises BadRequest, UnsupportedBody, TooLarge.
    """
    frames, height, width = clip_size(data, max_frames) if media_type == VIDEO_TYPE else (1, *picture_size(data))
    return Header(media_type, frames, height, width)


def read_file(data: bytes | bytearray, header: Header, mode: str) -> RawTensor:
    """uint8 `[F, H, W, C]`, of a picture one frame. mode: Pillow's, RGB or RGBA. Raises BadRequest."""
    if header.media_type == VIDEO_TYPE:
        return read_clip(data, header.frames, header.height, header.width)
    return read_picture(data, mode)


__all__ = ["VIDEO_TYPE", "Header", "media_type_of", "read_file", "read_header", "resized"]
