"""Images and videos to pixels, for encoding. The first bytes say what a file is; its header is checked first."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import RawTensor
from .image import image_size, read_image, resized
from .video import VideoHeader, read_video, read_video_header

VIDEO_TYPE = "video/mp4"
STILLS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"})  # pictures in such a box


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. height, width: upright if `rotate`, else as they are stored."""

    media_type: str
    frames: int
    height: int
    width: int
    rotate: bool = True
    video: VideoHeader | None = None


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


def read_header(data: bytes | bytearray, media_type: str, max_frames: int, *, rotate: bool = True) -> Header:
    """Read a file's header, before anything is decoded.

    rotate: as EXIF or the display matrix says, upright; else the stored axes. Raises BadRequest, UnsupportedBody,
    TooLarge.
    """
    if media_type != VIDEO_TYPE:
        return Header(media_type, 1, *image_size(data, rotate=rotate), rotate)
    video = read_video_header(data, max_frames)
    return Header(media_type, video.movie.frames, *video.size(rotate=rotate), rotate, video)


def read_file(data: bytes | bytearray, header: Header, mode: str) -> RawTensor:
    """uint8 `[F, H, W, C]`, of an image one frame. mode: Pillow's, RGB or RGBA. Raises BadRequest."""
    if header.video:
        return read_video(data, header.video, rotate=header.rotate)
    return read_image(data, mode, rotate=header.rotate)


__all__ = ["VIDEO_TYPE", "Header", "media_type_of", "read_file", "read_header", "resized"]
