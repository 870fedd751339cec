"""uint8 pixels `[1, H, W, C]` to JPEG and PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from server.errors import Impossible
from server.types import RawTensor, Rendered, RenderOptions

CHANNELS = (1, 3, 4)


def picture(pixels: RawTensor) -> Image.Image:
    """The pixels as a PIL image that shares their memory where the mode allows."""
    _, height, width, channels = pixels.shape
    if channels not in CHANNELS:
        raise Impossible(f"a picture of {channels} channels has no file format; ask for output_type=pt")
    rows = np.frombuffer(pixels.data, np.uint8).reshape(height, width, channels)
    return Image.fromarray(rows.squeeze(2) if channels == 1 else rows)


def render_jpeg(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """4:2:0, quality 75 unless asked otherwise, as the hosted service's."""
    image = picture(pixels)
    if image.mode == "RGBA":
        raise Impossible("a JPEG cannot hold an alpha channel; ask for image_format=png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(options.quality or 75), subsampling="4:2:0")
    return Rendered(buffer.getvalue(), options.media_type)


def render_png(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """zlib level 1: a third of the time of Pillow's default level for a tenth more bytes."""
    buffer = io.BytesIO()
    picture(pixels).save(buffer, "PNG", compress_level=1)
    return Rendered(buffer.getvalue(), options.media_type)
