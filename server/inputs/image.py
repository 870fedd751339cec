"""PNG, JPEG and WebP to pixels, and pixels to another size, as diffusers' image processor does both."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

from ..errors import BadRequest, TooLarge, UnsupportedBody
from ..values import RawTensor

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would try forty, some of them hardly ever attacked and hardly ever mended
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
MOST_SCANS = 100  # of a JPEG: each may be nearly empty and costs a pass over the whole picture
PNG_BITS = 24  # where the header says how many a channel has
# EXIF's orientations, and what makes each upright, as `ImageOps.exif_transpose` does.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = frozenset({5, 6, 7, 8})
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error)


def image_size(data: bytes | bytearray, *, rotate: bool) -> tuple[int, int]:
    """Return height and width, read from the header only; upright, as EXIF says, if `rotate`.

    Raises BadRequest, UnsupportedBody, TooLarge.
    """
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadRequest(f"the JPEG has more than {MOST_SCANS} scans; save it again")
    with _opened(data) as picture:
        # An MPO is a JPEG with further views in it, as phones write them; the first is the picture.
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise UnsupportedBody("animated pictures are not read; send one frame, or a clip as MP4 to a video model")
        if picture.mode not in MODES or (picture.format == "PNG" and data[PNG_BITS] > 8):  # Pillow cuts 16 to 8
            raise UnsupportedBody("the picture has more than 8 bits a channel; send 8 bits, or a float tensor")
        is_turned = rotate and _orientation(picture) in TURNED
        return (picture.width, picture.height) if is_turned else (picture.height, picture.width)


def read_image(data: bytes | bytearray, mode: str, *, rotate: bool) -> RawTensor:
    """uint8 `[1, H, W, C]`, upright, as EXIF says, if `rotate`. RGB drops an alpha channel, as `Image.convert` does.

    Raises BadRequest.
    """
    with _opened(data) as image:
        image.load()  # a PNG's EXIF may follow its pixels
        turn = UPRIGHT.get(_orientation(image)) if rotate else None
        converted = image.convert(mode)
        pixels = np.asarray(converted if turn is None else converted.transpose(turn))  # [H, W, C]
    return RawTensor((1, *pixels.shape), "uint8", pixels.reshape(-1).data)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, where 1 is upright, as far as it was read yet. EXIF that is damaged turns nothing."""
    try:
        # The base class's method: that of PngImageFile would decode all pixels to look for EXIF that follows them.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except DAMAGED:
        return 1


@contextmanager
def _opened(data: bytes | bytearray) -> Iterator[Image.Image]:
    """Raises BadRequest, now or when it is read, and TooLarge."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            yield picture
    except Image.DecompressionBombError:
        raise TooLarge("the picture has more pixels than any model takes; send a smaller one") from None
    except DAMAGED:
        raise BadRequest("the picture is damaged or cut short; send a whole PNG, JPEG or WebP") from None


def resized(frames: RawTensor, height: int, width: int) -> RawTensor:
    """uint8 `[F, H, W, 3]` by Lanczos, as `VaeImageProcessor.resize`; frames of this size already are left alone."""
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = np.frombuffer(frames.data, np.uint8).reshape(frames.shape)
    fitted = np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)) for frame in pixels]
    )
    return RawTensor(fitted.shape, "uint8", fitted.reshape(-1).data)
