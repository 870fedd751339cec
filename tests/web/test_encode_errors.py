"""What cannot be encoded: a sentence that says so, before a pixel is decoded where the header says enough."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import requests
from PIL import Image, PngImagePlugin

from server.contract import encode as wire_encode
from server.outputs.video import render_mp4
from server.values import RawTensor, RenderOptions
from tests.inputs.mp4 import few, full, movie, numbers, trak
from tests.web.test_errors import assert_refused
from tests.web.test_remote_encode import picture


def assert_says(response: requests.Response, status: int, code: str, words: str) -> None:
    assert_refused(response, status, code, re.escape(words))


def file_of(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or picture(64, 64)).save(file, kind, **options)
    return file.getvalue()


def png_that_claims(width: int, height: int, bits: int = 8, colours: int = 2) -> bytes:
    """A header, and pixels for none of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def clip(frames: int, side: int = 32) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (frames, side, side, 3), np.uint8)
    raw = RawTensor(pixels.shape, "uint8", memoryview(pixels.tobytes()))
    return bytes(render_mp4(raw, RenderOptions(fps=10, quality=5, media_type="video/mp4")).body)


def ask(url: str, body: bytes, model: str = "sd", headers: dict[str, str] | None = None, **params: Any) -> Any:
    return requests.post(f"{url}{model}/encode", body, params=params, headers=headers, timeout=300)


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever decodes pixels fails the test."""

    def decoded(*_: Any) -> RawTensor:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(wire_encode, "read_file", decoded)


FILES: list[tuple[Callable[[], bytes], int, str, str]] = [
    (lambda: b"no picture at all", 415, "unsupported_body", "not a PNG, JPEG, WebP or MP4"),
    (lambda: b"", 400, "bad_request", "the body is empty"),
    (lambda: b"\0\0\0\x1cftypavif" + bytes(99), 415, "unsupported_body", "not a PNG, JPEG, WebP or MP4"),
    (lambda: png_that_claims(64, 64, 16, 2), 415, "unsupported_body", "more than 8 bits"),
    (lambda: png_that_claims(64, 64, 16, 6), 415, "unsupported_body", "more than 8 bits"),
    (lambda: file_of("GIF"), 415, "unsupported_body", "not a PNG, JPEG, WebP or MP4"),
    (lambda: file_of("TIFF"), 415, "unsupported_body", "not a PNG"),
    (lambda: file_of("BMP"), 415, "unsupported_body", "not a PNG"),
    (lambda: file_of("JPEG2000"), 415, "unsupported_body", "not a PNG"),
    (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "unsupported_body", "not a PNG"),
    (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415, "unsupported_body", "not a PNG"),
    (lambda: png_that_claims(60_000, 60_000), 413, "too_large", "more pixels than any model takes"),
    (lambda: png_that_claims(9_000, 9_000), 413, "too_large", "9000x9000 is 81000000 pixels"),
    (lambda: file_of("JPEG")[:-2] + b"\xff\xda\0\2" * 200, 400, "bad_request", "more than 100 scans"),
    (lambda: png_that_claims(1024, 256), 413, "too_large", "takes at most 131072"),
    (lambda: png_that_claims(64, 64, 16, 0), 415, "unsupported_body", "more than 8 bits"),
    (
        lambda: file_of("PNG", save_all=True, append_images=[picture(64, 64)]),
        415,
        "unsupported_body",
        "animated images are not supported",
    ),
    (
        lambda: file_of("WEBP", save_all=True, append_images=[picture(64, 64).rotate(90)]),
        415,
        "unsupported_body",
        "animated",
    ),
    (lambda: file_of("PNG")[:20], 400, "bad_request", "damaged or cut short"),
    (lambda: clip(2), 422, "impossible", "this model encodes images, but the body is a video"),
]


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize(("make", "status", "code", "words"), FILES)
def test_a_file_is_refused_by_its_header(
    url: str, make: Callable[[], bytes], status: int, code: str, words: str
) -> None:
    assert_says(ask(url, make()), status, code, words)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_that_is_cut_short_is_refused(url: str, kind: str) -> None:
    whole = file_of(kind)
    assert_says(ask(url, whole[: len(whole) // 2]), 400, "bad_request", "the image is damaged or cut short")


def test_a_picture_smaller_than_one_latent_is_refused(url: str) -> None:
    assert_says(
        ask(url, file_of("PNG", picture(64, 7))),
        422,
        "impossible",
        "a width of 7 pixels is less than this model's minimum of 8",
    )


def test_a_text_bomb_in_a_png_is_refused(url: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (64 << 20), zip=True)
    assert_says(ask(url, file_of("PNG", pnginfo=text)), 400, "bad_request", "damaged")


TENSORS: list[tuple[dict[str, Any], bytes, int, str, str]] = [
    ({"shape": [1, 4, 64, 64]}, b"", 400, "wrong_shape", "send RGB pixels [B, 3, H, W]"),
    ({"shape": [1, 3, 9, 64, 64]}, b"", 400, "wrong_shape", "send RGB pixels [B, 3, H, W]"),
    ({"dtype": "float64"}, b"", 400, "bad_request", "dtype of pixels must be one of uint8, float16"),
    ({}, bytes(9), 400, "wrong_length", "needs 12288 bytes, but the body has 9"),
    ({"dtype": "float32"}, bytes(12288), 400, "wrong_length", "was dtype=uint8 meant?"),
    ({"shape": [9, 3, 64, 64]}, b"", 413, "too_large", "a batch of 9"),
    ({"shape": [1, 3, 512, 512]}, b"", 413, "too_large", "takes at most 131072"),
    ({"shape": [1, 3, 4, 64]}, b"", 422, "impossible", "a height of 4 pixels"),
    ({"sample": "True"}, b"", 400, "bad_request", "needs a seed"),
    ({"sample": "True", "seed": "9" * 20}, b"", 400, "bad_request", "from 0 to 2**64 - 1"),
    ({"scaling_factor": 0}, b"", 400, "bad_request", "must not be zero"),
]


@pytest.mark.parametrize(("changed", "body", "status", "code", "words"), TENSORS)
def test_a_tensor_of_pixels_is_refused(
    url: str, changed: dict[str, Any], body: bytes, status: int, code: str, words: str
) -> None:
    assert_says(ask(url, body, **{"shape": [1, 3, 64, 64], "dtype": "uint8", **changed}), status, code, words)


@pytest.mark.parametrize(("value", "code", "words"), [
    (np.nan, "nonfinite_input", "NaN or infinite"), (np.inf, "nonfinite_input", "NaN or infinite"),
    (255.0, "bad_request", "in [-1, 1], but these reach 255; send uint8"),
])  # fmt: skip
def test_pixels_out_of_range_are_refused(url: str, value: float, code: str, words: str) -> None:
    pixels = np.zeros((1, 3, 16, 16), "float32")
    pixels[0, 1, 2, 3] = value
    assert_says(ask(url, pixels.tobytes(), shape=pixels.shape, dtype="float32"), 400, code, words)


def test_what_an_answer_cannot_be(url: str) -> None:
    refused = ask(url, file_of("PNG"), headers={"Accept": "image/png"})
    assert_says(refused, 406, "not_acceptable", "send one of tensor/binary")
    form = ask(url, b"x", headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert_says(form, 415, "unsupported_body", "send the file itself as the body")
    assert_says(ask(url, b"", model="nobody"), 404, "unknown_model", "known models")


CLIPS: list[tuple[Callable[[], bytes], int, str, str]] = [
    (lambda: clip(8), 422, "impossible", "takes 4 k + 1 frames; send 5 or 9"),
    (lambda: clip(21), 413, "too_large", "frames, but 'hunyuan' takes at most 17"),
    (lambda: clip(5)[:-900], 400, "bad_request", "the MP4's index is damaged or cut short"),
    (lambda: b"\0\0\0\x18ftypmp42" + bytes(999), 400, "bad_request", "the MP4's index is damaged"),
    (lambda: movie(trak(few(stsz=full(b"stsz", numbers(1, 85_000_000))))), 413, "too_large", "85000000 frames"),
]


@pytest.mark.parametrize(("make", "status", "code", "words"), CLIPS)
def test_a_clip_is_refused(url: str, make: Callable[[], bytes], status: int, code: str, words: str) -> None:
    assert_says(ask(url, make(), model="hunyuan"), status, code, words)


def test_a_clip_of_an_unusual_codec_is_refused(url: str) -> None:
    """ffmpeg has hundreds of decoders, most of them hardly ever attacked and hardly ever mended."""
    made = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "testsrc=size=64x64:rate=5:duration=1",
         "-c:v", "mpeg2video", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov", "-"], capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert_says(ask(url, made, model="hunyuan"), 400, "bad_request", "not of a usual codec")


def test_one_bad_picture_does_not_spoil_the_next(url: str) -> None:
    assert ask(url, file_of("PNG")[:99]).status_code == 400
    assert ask(url, file_of("PNG")).ok


def test_wrong_latents_are_told_which_models_take_them(url: str) -> None:
    params = {"shape": [1, 4, 8, 8], "dtype": "float32"}
    refused = requests.post(url + "flux", bytes(1024), params=params, timeout=300)
    assert_says(refused, 400, "wrong_shape", "models of this server that accept them: sd, sd-bf16, sdxl, sdxl-half")
