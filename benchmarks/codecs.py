"""Compare this server's image and video encoders with others, alternating, on a photograph with sensor noise.

Besides the time, it measures how long another thread of Python waits at most: an encoder that holds the GIL also stops
the thread that gives the device its work.

`python -m benchmarks.codecs [--size 1024] [--frames 61] [--repeats 7]`. Other libraries are measured if they are
installed; `make bench` installs them with `pip install -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from server.outputs import format_named, png
from server.values import RawTensor, RenderOptions

Pixels = NDArray[np.uint8]
Encoder = Callable[[Pixels], bytes]
SLEEP_S = 0.0005


def ours(name: str) -> Encoder:
    """Return this server's encoder of a format."""

    def encode(pixels: Pixels) -> bytes:
        tensor = RawTensor((1, *pixels.shape), "uint8", pixels.reshape(-1).data)
        return bytes(format_named(name).render(tensor, RenderOptions(10, 75, "")).body)

    return encode


def pillow(format_name: str, **options: Any) -> Encoder:
    """Return Pillow's encoder of a format. options: passed to `Image.save`."""

    def encode(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format_name, **options)
        return buffer.getvalue()

    return encode


def our_png_with(compress: Callable[..., bytes]) -> Encoder:
    """Return this server's PNG encoder with another function that compresses."""

    def encode(pixels: Pixels) -> bytes:
        kept, png.compress = png.compress, compress
        try:
            return png.encode_png(pixels)
        finally:
            png.compress = kept

    return encode


def others() -> Iterator[tuple[str, Encoder]]:
    """Yield the image encoders of other libraries that are installed, with their names."""
    with suppress(ImportError):
        imagecodecs = importlib.import_module("imagecodecs")
        yield "PNG imagecodecs, level 1", lambda pixels: imagecodecs.png_encode(pixels, level=1)
        yield "JPEG imagecodecs", lambda pixels: imagecodecs.jpeg_encode(pixels, 75)
    with suppress(ImportError):
        simplejpeg = importlib.import_module("simplejpeg")
        yield "JPEG simplejpeg", lambda pixels: simplejpeg.encode_jpeg(pixels, 75, "RGB", "420", fastdct=False)
    with suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        yield "PNG OpenCV", lambda pixels: cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
        quality = [cv2.IMWRITE_JPEG_QUALITY, 75]
        yield "JPEG OpenCV", lambda pixels: cv2.imencode(".jpg", pixels[..., ::-1], quality)[1].tobytes()
    with suppress(ImportError):
        fpng = importlib.import_module("fpng_py")
        yield "PNG fpng", lambda pixels: fpng.fpng_encode_image_to_memory(pixels.tobytes(), *pixels.shape[1::-1])
    with suppress(ImportError):
        zlib_ng = importlib.import_module("zlib_ng.zlib_ng")
        yield "PNG Average filter + zlib-ng 1", our_png_with(zlib_ng.compress)


def our_mp4(frames: Pixels) -> bytes:  # [F, H, W, 3]
    """Return an MP4 that this server encodes."""
    tensor = RawTensor(frames.shape, "uint8", frames.reshape(-1).data)
    return bytes(format_named("mp4").render(tensor, RenderOptions(10, 5, "")).body)


def pyav_mp4(frames: Pixels) -> bytes:  # [F, H, W, 3]
    """Return an MP4 that PyAV encodes in this process, with the same codec, rate and quality."""
    av = importlib.import_module("av")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # a file, because the index is written to its beginning
        with av.open(file.name, "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "25"})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return Path(file.name).read_bytes()


def imageio_mp4(frames: Pixels) -> bytes:  # [F, H, W, 3]
    """Return an MP4 that imageio-ffmpeg's writer encodes, as diffusers' export_to_video does."""
    imageio_ffmpeg = importlib.import_module("imageio_ffmpeg")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        writer = imageio_ffmpeg.write_frames(file.name, frames.shape[2:0:-1], fps=10, quality=5, macro_block_size=2)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return Path(file.name).read_bytes()


def video_encoders() -> Iterator[tuple[str, Encoder]]:
    """Yield the video encoders that are installed, with their names."""
    yield "MP4 ours (ffmpeg process)", our_mp4
    yield "MP4 imageio-ffmpeg's writer", imageio_mp4
    if importlib.util.find_spec("av"):
        yield "MP4 PyAV", pyav_mp4


def film(frames: int, height: int, width: int) -> Pixels:
    """Return the frames of a slow pan over a photograph."""
    still = photo(max(height, width) + frames)
    return np.stack([still[i : i + height, i : i + width] for i in range(frames)])


def photo(size: int) -> Pixels:
    """Return a square photograph with sensor noise."""
    scaled = Image.fromarray(skimage.data.astronaut()).resize((size, size), Image.Resampling.LANCZOS)
    noisy = np.asarray(scaled) + np.random.default_rng(0).normal(0, 2, (size, size, 3))
    return np.clip(noisy, 0, 255).round().astype(np.uint8)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=61)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    encoders: dict[str, Encoder] = {
        "PNG ours": ours("png"),
        "PNG Pillow, its default (6)": pillow("PNG"),
        "PNG Pillow, level 1": pillow("PNG", compress_level=1),
        "PNG Average filter + zlib 1": our_png_with(zlib.compress),
        "JPEG ours (Pillow, into a file in memory)": ours("jpg"),
        "JPEG Pillow, into a BytesIO": pillow("JPEG", quality=75, subsampling="4:2:0"),
        **dict(others()),
    }
    print(f"images of {arguments.size}x{arguments.size}, and videos of {arguments.frames} frames of 320x512\n")
    print("| codec | ms | another thread waits ms | KiB |\n| --- | --- | --- | --- |")
    with Bystander() as bystander:
        table(encoders, photo(arguments.size), arguments.repeats, bystander)
        videos = dict(video_encoders())
        table(videos, film(arguments.frames, 320, 512), max(1, arguments.repeats // 2), bystander)


class Bystander:
    """A thread that sleeps and wakes while it is entered, and notes how late it could go on."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._late_ms: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Bystander:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def longest_ms(self) -> float:
        """Return by how much it was late at most since the last call."""
        late, self._late_ms = self._late_ms, []
        return max(late, default=0.0)

    def _run(self) -> None:
        while not self._ended.is_set():
            started = time.perf_counter()
            time.sleep(SLEEP_S)
            self._late_ms.append((time.perf_counter() - started - SLEEP_S) * 1e3)


def table(encoders: dict[str, Encoder], pixels: Pixels, repeats: int, bystander: Bystander) -> None:
    """Measure the encoders, and print a row for each with the median times and the size."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    waits: dict[str, list[float]] = {name: [] for name in encoders}
    sizes = {}
    for _ in range(repeats):
        for name, encode in encoders.items():
            bystander.longest_ms()
            started = time.perf_counter()
            sizes[name] = len(encode(pixels))
            times[name].append((time.perf_counter() - started) * 1e3)
            time.sleep(2 * SLEEP_S)  # so that a wait is noted that lasted until the end
            waits[name].append(bystander.longest_ms())
    for name in sorted(encoders):
        took, waited = statistics.median(times[name]), statistics.median(waits[name])
        print(f"| {name} | {took:.1f} | {waited:.1f} | {sizes[name] >> 10} |")


if __name__ == "__main__":
    main()
