"""Images to pixels: upright, as EXIF says and diffusers does it, however the EXIF lies in the file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import ExifTags, Image

from server.inputs import media_type_of, read_file, read_header

ORIENTATIONS = range(1, 9)


def photo(mode: str = "RGB") -> Image.Image:
    """Its four corners differ, and so do its sides."""
    across, down = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 24))
    return Image.fromarray(np.stack([across, down, 255 - across / 2], -1).astype(np.uint8)).convert(mode)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def file_of(kind: str, image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(data: bytes, mode: str = "RGB", *, rotate: bool = True) -> np.ndarray:
    kind = media_type_of(data)
    assert kind
    header = read_header(data, kind, 1, rotate=rotate)
    raw = read_file(data, header, mode)
    assert raw.shape[1:3] == (header.height, header.width)
    return np.frombuffer(raw.data, np.uint8).reshape(raw.shape)[0]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_applied_as_load_image_does(kind: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(file_of(kind, photo(), exif=exif_of(orientation)))
    assert np.array_equal(read(path.read_bytes()), np.asarray(load_image(str(path))))
    with Image.open(path) as stored:
        assert np.array_equal(read(path.read_bytes(), rotate=False), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "1"])
def test_exif_is_applied_to_pictures_of_every_mode(mode: str) -> None:
    turned = read(file_of("PNG", photo(mode), exif=exif_of(6)), "RGBA")
    expected = photo(mode).convert("RGBA").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(turned, np.asarray(expected))


def test_exif_may_follow_the_pixels_of_a_png() -> None:
    """The size is then known with the pixels; the header is read without them."""
    whole, exif = file_of("PNG", photo()), exif_of(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = whole[:-12] + chunk + whole[-12:]
    header = read_header(data, "image/png", 1)
    assert (header.height, header.width) == (24, 40)
    assert read_file(data, header, "RGB").shape == (1, 40, 24, 3)


@pytest.mark.filterwarnings("ignore:.*orrupt EXIF data")
@pytest.mark.parametrize("orientation", [b"\0\0", b"\xff\xff", b"\0\x09"], ids=repr)
def test_exif_that_is_damaged_turns_nothing(orientation: bytes) -> None:
    whole = exif_of(6).tobytes()
    for exif in (whole[:9], whole[:20], b"Exif\0\0nonsense", whole.replace(b"\0\x06", orientation), b"Exif\0\0"):
        for kind in ("JPEG", "PNG", "WEBP"):
            assert read(file_of(kind, photo(), exif=exif)).shape == (24, 40, 3)
