"""uint8 pixels `[1, H, W, C]` to JPEG and PNG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import Impossible
from ..values import RawTensor, Rendered, RenderOptions
from .png import encode_png

CHANNELS = (1, 3, 4)


def pixels_of(tensor: RawTensor) -> NDArray[np.uint8]:
    """`[H, W, C]`, sharing the tensor's memory. Raises Impossible."""
    _, height, width, channels = tensor.shape
    if channels not in CHANNELS:
        raise Impossible(f"a picture of {channels} channels has no file format; ask for output_type=pt")
    return np.frombuffer(tensor.data, np.uint8).reshape(height, width, channels)


def picture(tensor: RawTensor) -> Image.Image:
    """The pixels as a PIL image; RGB ones are not copied."""
    pixels = pixels_of(tensor)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def render_jpeg(tensor: RawTensor, options: RenderOptions) -> Rendered:
    """4:2:0, quality 75 unless asked otherwise, as the hosted service's."""
    image = picture(tensor)
    if image.mode == "RGBA":
        raise Impossible("a JPEG cannot hold an alpha channel; ask for image_format=png")
    buffer = io.BytesIO()
    # simplejpeg takes a millisecond less at 1024² and loses 0.02 dB (benchmarks/codecs.py).
    image.save(buffer, "JPEG", quality=int(options.quality or 75), subsampling="4:2:0")
    return Rendered(buffer.getbuffer(), options.media_type)


def render_png(tensor: RawTensor, options: RenderOptions) -> Rendered:
    return Rendered(memoryview(encode_png(pixels_of(tensor))), options.media_type)
