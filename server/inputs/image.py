"""Read PNG, JPEG and WebP as pixels, and resize pixels, both as diffusers' image processor does."""

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

# Without this list Pillow would try about forty formats. Some of their decoders are rarely tested and rarely fixed.
FORMATS = ("PNG", "JPEG", "WEBP")
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
# How many scans a JPEG may have. A scan may be nearly empty, and still costs a pass over the whole image.
MOST_SCANS = 100
PNG_BITS = 24  # the offset of the byte that says how many bits a channel has
# For each orientation of EXIF, the operation that turns the image upright, as in `ImageOps.exif_transpose`.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = frozenset({5, 6, 7, 8})  # the orientations that swap width and height
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error)


def image_size(data: bytes | bytearray, *, rotate: bool) -> tuple[int, int]:
    """Return height and width from the header, without decoding pixels.

    rotate: return the size of the image after turning it upright, as its EXIF data says.
    Raises BadRequest for a damaged file, UnsupportedBody for an animation or more than 8 bits a channel, and TooLarge
    for more pixels than Pillow opens.
    """
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadRequest(f"the JPEG has more than {MOST_SCANS} scans; save it again")
    with _opened(data) as image:
        # An MPO is a JPEG with further views in it, written by phones. The first view is the photo.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UnsupportedBody("animated images are not supported; send one frame, or an MP4 to a video model")
        # Pillow would cut the 16 bits of a PNG to 8.
        if image.mode not in MODES or (image.format == "PNG" and data[PNG_BITS] > 8):
            raise UnsupportedBody("the image has more than 8 bits per channel; send 8 bits, or a float tensor")
        is_turned = rotate and _orientation(image) in TURNED
        return (image.width, image.height) if is_turned else (image.height, image.width)


def read_image(data: bytes | bytearray, mode: str, *, rotate: bool) -> RawTensor:
    """Decode an image to uint8 `[1, H, W, C]`.

    mode: "RGB", which drops an alpha channel as `Image.convert` does, or "RGBA".
    rotate: turn the image upright, as its EXIF data says.
    Raises BadRequest for a damaged file.
    """
    with _opened(data) as image:
        image.load()  # needed first, because the EXIF data of a PNG may follow its pixels
        turn = UPRIGHT.get(_orientation(image)) if rotate else None
        converted = image.convert(mode)
        pixels = np.asarray(converted if turn is None else converted.transpose(turn))  # [H, W, C]
    return RawTensor((1, *pixels.shape), "uint8", pixels.reshape(-1).data)


def _orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF, 1 to 8, where 1 is upright.

    EXIF data that was not read yet, is missing or is damaged counts as upright.
    """
    try:
        # The method of the base class, because that of PngImageFile decodes all pixels to find EXIF data after them.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except DAMAGED:
        return 1


@contextmanager
def _opened(data: bytes | bytearray) -> Iterator[Image.Image]:
    """Open an image. Raises TooLarge if it has too many pixels, BadRequest if opening or using it fails."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except Image.DecompressionBombError:
        raise TooLarge("the image has more pixels than any model takes; send a smaller one") from None
    except DAMAGED:
        raise BadRequest("the image is damaged or cut short; send a whole PNG, JPEG or WebP") from None


def resized(frames: RawTensor, height: int, width: int) -> RawTensor:
    """Resize uint8 frames `[F, H, W, C]` with a Lanczos filter, as `VaeImageProcessor.resize` does.

    Frames that have this size already are returned unchanged.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = np.frombuffer(frames.data, np.uint8).reshape(frames.shape)
    fitted = np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)) for frame in pixels]
    )
    return RawTensor(fitted.shape, "uint8", fitted.reshape(-1).data)
