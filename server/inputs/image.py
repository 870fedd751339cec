"""PNG, JPEG and WebP to pixels, and pixels to another size, as diffusers' image processor does both."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from server.errors import BadRequest, TooLarge, UnsupportedBody
from server.types import RawTensor

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would try forty, some of them hardly ever attacked and hardly ever mended
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
MOST_SCANS = 100  # of a JPEG: each may be nearly empty and costs a pass over the whole picture
PNG_BITS = 24  # where the header says how many a channel has
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error)


def picture_size(data: bytes | bytearray) -> tuple[int, int]:
    """Height and width, from the header alone. Raises BadRequest, UnsupportedBody, TooLarge."""
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadRequest(f"the JPEG has more than {MOST_SCANS} scans; save it again")
    with _opened(data) as picture:
        # An MPO is a JPEG with further views in it, as phones write them; the first is the picture.
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise UnsupportedBody("animated pictures are not read; send one frame, or a clip as MP4 to a video model")
        if picture.mode not in MODES or (picture.format == "PNG" and data[PNG_BITS] > 8):  # Pillow cuts 16 to 8
            raise UnsupportedBody("the picture has more than 8 bits a channel; send 8 bits, or a float tensor")
        return picture.height, picture.width


def read_picture(data: bytes | bytearray, mode: str) -> RawTensor:
    """uint8 `[1, H, W, C]`. RGB drops an alpha channel, as `Image.convert` does; EXIF is ignored.

    Raises BadRequest.
    """
    with _opened(data) as picture:
        pixels = np.asarray(picture.convert(mode))  # [H, W, C]
    return RawTensor((1, *pixels.shape), "uint8", pixels.reshape(-1).data)


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
