"""Read images and videos as pixels, for encoding.

The first bytes of a file tell its type, whatever the client calls it. Its header is checked before it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..values import RawTensor
from .image import image_size, read_image, resized
from .video import VideoHeader, read_video, read_video_header

VIDEO_TYPE = "video/mp4"
# The brands of image formats that have the same container as MP4.
STILLS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"})


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image or video file.

    frames: 1 for an image.
    height, width: in pixels; if `rotate`, after turning the image upright, else as stored.
    video: the index of a video; None for an image.
    """

    media_type: str
    frames: int
    height: int
    width: int
    rotate: bool = True
    video: VideoHeader | None = None


def media_type_of(data: bytes | bytearray | memoryview) -> str | None:
    """Return the media type that the first bytes tell: PNG, JPEG, WebP or MP4. None for anything else."""
    head = bytes(data[:12])
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "image/webp"
    return VIDEO_TYPE if head[4:8] == b"ftyp" and head[8:] not in STILLS else None


def read_header(data: bytes | bytearray, media_type: str, max_frames: int, *, rotate: bool = True) -> Header:
    """Read the header of a file without decoding any pixels.

    media_type: as `media_type_of` returns it.
    max_frames: the most frames that the model takes.
    rotate: turn the image upright, as its EXIF data or the video's display matrix says.
    Raises BadRequest, UnsupportedBody, TooLarge.
    """
    if media_type != VIDEO_TYPE:
        return Header(media_type, 1, *image_size(data, rotate=rotate), rotate)
    video = read_video_header(data, max_frames)
    return Header(media_type, video.movie.frames, *video.size(rotate=rotate), rotate, video)


def read_file(data: bytes | bytearray, header: Header, mode: str) -> RawTensor:
    """Decode a file to uint8 `[F, H, W, C]`; an image has one frame.

    header: as `read_header` returns it. mode: the mode for images, "RGB" or "RGBA". Raises BadRequest.
    """
    if header.video:
        return read_video(data, header.video, rotate=header.rotate)
    return read_image(data, mode, rotate=header.rotate)


__all__ = ["VIDEO_TYPE", "Header", "media_type_of", "read_file", "read_header", "resized"]
