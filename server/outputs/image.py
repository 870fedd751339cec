"""Render uint8 pixels `[1, H, W, C]` as JPEG and PNG."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import Impossible
from ..memory_file import memory_file
from ..values import RawTensor, Rendered, RenderOptions
from .png import encode_png

CHANNELS = (1, 3, 4)


def pixels_of(tensor: RawTensor) -> NDArray[np.uint8]:
    """Return the pixels `[H, W, C]` as an array that shares the tensor's memory.

    Raises Impossible unless there are 1, 3 or 4 channels.
    """
    _, height, width, channels = tensor.shape
    if channels not in CHANNELS:
        raise Impossible(f"an image of {channels} channels has no file format; ask for output_type=pt")
    return np.frombuffer(tensor.data, np.uint8).reshape(height, width, channels)


def as_image(tensor: RawTensor) -> Image.Image:
    """Return the pixels `[1, H, W, C]` as a PIL image, without copying them if possible.

    Raises Impossible unless there are 1, 3 or 4 channels.
    """
    pixels = pixels_of(tensor)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def render_jpeg(tensor: RawTensor, options: RenderOptions) -> Rendered:
    """Render a JPEG with 4:2:0 subsampling and a default quality of 75, as the hosted service does.

    Raises Impossible for pixels with an alpha channel.
    """
    image = as_image(tensor)
    if image.mode == "RGBA":
        raise Impossible("a JPEG cannot hold an alpha channel; ask for image_format=png")
    # A file and not a BytesIO, into which Pillow would encode without letting any other thread of this process run.
    with memory_file() as (file, *_):
        # Not simplejpeg: at 1024² it saves a millisecond and loses 0.02 dB (benchmarks/codecs.py).
        image.save(file, "JPEG", quality=int(options.quality or 75), subsampling="4:2:0")
        file.seek(0)
        return Rendered(memoryview(file.read()), options.media_type)


def render_png(tensor: RawTensor, options: RenderOptions) -> Rendered:
    """Render a PNG. Raises Impossible unless there are 1, 3 or 4 channels."""
    return Rendered(memoryview(encode_png(pixels_of(tensor))), options.media_type)
