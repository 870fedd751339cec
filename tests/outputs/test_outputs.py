"""Pixels to files, read back by other programs."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from server.errors import Impossible
from server.outputs import format_named
from server.values import RawTensor, RenderOptions


def options(media_type: str = "x/y", quality: float | None = None, fps: float = 10) -> RenderOptions:
    return RenderOptions(fps, quality, media_type)


def raw(pixels: np.ndarray) -> RawTensor:
    return RawTensor(pixels.shape, str(pixels.dtype), np.ascontiguousarray(pixels).reshape(-1).view("uint8").data)


def smooth(*shape: int) -> np.ndarray:
    """Something a codec can keep: slow colours that differ by channel."""
    axes = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    return np.stack([128 + 100 * np.sin(3 * sum(axes) + phase) for phase in (0, 2, 4)], -1).astype("uint8")


@pytest.mark.parametrize("shape", [(24, 40, 1), (24, 40, 3), (24, 40, 4), (1, 1, 3), (1, 7, 3), (9, 1, 4)])
def test_a_png_holds_the_very_pixels(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Read back by libpng (through Pillow) and by ffmpeg's own decoder."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, *shape), "uint8")
    body = bytes(format_named("png").render(raw(pixels), options()).body)
    with Image.open(io.BytesIO(body)) as image:
        image.verify()
    with Image.open(io.BytesIO(body)) as image:
        assert np.array_equal(np.asarray(image).reshape(shape), pixels[0])
    (tmp_path / "picture.png").write_bytes(body)
    layout = {1: "gray", 3: "rgb24", 4: "rgba"}[shape[2]]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "picture.png"), "-f", "rawvideo"]
    decoded = subprocess.run([*command, "-pix_fmt", layout, "-"], capture_output=True, check=True).stdout
    assert decoded == pixels.tobytes()


def test_a_photo_like_png_is_no_larger_than_pillows_fast_one() -> None:
    pixels = smooth(512, 512) // 2 + np.random.default_rng(0).integers(0, 4, (512, 512, 3), "uint8")
    pillows = io.BytesIO()
    Image.fromarray(pixels).save(pillows, "PNG", compress_level=1)
    assert len(format_named("png").render(raw(pixels[None]), options()).body) < 1.1 * len(pillows.getvalue())


def test_without_isal_zlib_makes_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.outputs.png.compress", zlib.compress)
    pixels = smooth(64, 96)
    body = format_named("png").render(raw(pixels[None]), options()).body
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), pixels)


def test_a_jpeg_is_the_hosted_services() -> None:
    pixels = smooth(64, 96)
    body = format_named("jpg").render(raw(pixels[None]), options(quality=75)).body
    image = Image.open(io.BytesIO(body))
    reference = io.BytesIO()
    Image.fromarray(pixels).save(reference, "JPEG")
    assert image.quantization == Image.open(reference).quantization
    assert [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)], "4:2:0"
    assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 3
    assert len(format_named("jpg").render(raw(pixels[None]), options(quality=20)).body) < len(body)


def test_what_no_file_can_hold_is_impossible() -> None:
    for name, channels in [("jpg", 4), ("png", 2), ("mp4", 4)]:
        with pytest.raises(Impossible, match=r"ask for (output_type=pt|image_format=png)"):
            format_named(name).render(raw(np.zeros((1, 8, 8, channels), "uint8")), options())


def test_a_tensor_is_its_bytes() -> None:
    values = np.arange(12, dtype="float32").reshape(1, 3, 4)
    rendered = format_named("binary").render(raw(values), options())
    assert bytes(rendered.body) == values.tobytes()
    assert rendered.headers == {"shape": "[1, 3, 4]", "dtype": "float32"}
    content = json.loads(bytes(format_named("base64").render(raw(values), options()).body))
    assert content["parameters"] == {"shape": [1, 3, 4], "dtype": "float32"}
    assert base64.b64decode(content["inputs"]) == values.tobytes()


def probe(path: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def frames_of(path: Path, height: int, width: int) -> np.ndarray:
    exact = ["-vf", "scale=flags=accurate_rnd+full_chroma_int+full_chroma_inp"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), *exact]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(decoded, "uint8").reshape(-1, height, width, 3)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 96), (64, 95), (33, 35)])
def test_an_mp4_has_every_frame_in_its_colours_padded_to_even_sizes(height: int, width: int, tmp_path: Path) -> None:
    pixels = smooth(13, height, width)
    path = tmp_path / "clip.mp4"
    path.write_bytes(format_named("mp4").render(raw(pixels), options(fps=12, quality=9)).body)
    even_height, even_width = height + height % 2, width + width % 2
    told = probe(path)
    assert "h264" in told
    assert "yuv420p(tv, bt709," in told
    assert f"{even_width}x{even_height}" in told
    assert "12 fps" in told
    frames = frames_of(path, even_height, even_width)
    assert len(frames) == 13
    kept = frames[:, :height, :width].astype(int)
    assert np.abs(kept - pixels).mean() < 4
    assert np.abs(kept.mean((0, 1, 2)) - pixels.mean((0, 1, 2))).max() < 1, "the mean colour must not shift"
    if height % 2:
        assert np.abs(frames[:, -1].astype(int) - frames[:, -2]).mean() < 8, "the edge is repeated, not black"


def test_an_mp4_can_be_played_while_it_loads() -> None:
    body = bytes(format_named("mp4").render(raw(smooth(5, 32, 32)), options()).body)
    assert body.index(b"moov") < body.index(b"mdat")


def test_a_fragmented_mp4_has_the_same_frames_each_in_a_fragment(tmp_path: Path) -> None:
    pixels = smooth(13, 64, 96)
    made = format_named("fragmented-mp4").render_frames
    assert made is not None
    path = tmp_path / "clip.mp4"
    path.write_bytes(made(iter([raw(pixels[:1]), raw(pixels[1:5]), raw(pixels[5:])]), options(fps=12, quality=9)).body)
    assert "12 fps" in probe(path)
    frames = frames_of(path, 64, 96)
    assert len(frames) == path.read_bytes().count(b"moof") == 13
    assert np.abs(frames.astype(int) - pixels).mean() < 4


def test_quality_and_fps_change_an_mp4() -> None:
    noisy = raw(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), "uint8"))
    sizes = [len(format_named("mp4").render(noisy, options(quality=q)).body) for q in (1, 5, 10)]
    assert sizes == sorted(sizes)


def test_the_best_quality_is_still_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(format_named("mp4").render(raw(smooth(3, 32, 32)), options(quality=10)).body)
    assert "h264 (High)" in probe(path)


def test_a_failing_ffmpeg_is_an_error_not_an_empty_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match="ffmpeg ended with status 1"):
        format_named("mp4").render(raw(smooth(2, 32, 32)), options())
