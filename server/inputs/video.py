"""Read an MP4 as pixels, with ffmpeg in its own process."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import ffmpeg
from ..errors import BadRequest
from ..memory_file import memory_file
from ..values import RawTensor
from .boxes import SKIPPED, Movie, read_movie

# Whatever the file contains, ffmpeg must not open other files or network addresses, and may only use these decoders.
CODECS = "h264,hevc,av1,libdav1d,vp9,mpeg4"
INPUT = ("-v", "error", "-xerror", "-f", "mov", "-protocol_whitelist", "file", "-codec_whitelist", CODECS)
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # ffmpeg's default conversion darkens by about one level
DIMENSIONS = re.compile(rb"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
# Address space of ffmpeg. With two threads, 1080p took 340 MiB and 4K with 10 bits took 620 MiB, whether in H.264,
# HEVC, VP9 or AV1.
THREADS = ("-threads", "2", "-filter_threads", "1")
BASE_BYTES, HELD_FRAMES, RGB = 512 << 20, 16, 3
MOST_PIXELS = 1 << 26  # the limit for a frame whose size is not known yet: 8192x8192
LEAST_PIXELS = 1 << 20  # the limit is at least this, because decoders count the padding that they add to a small frame
# Processor time of ffmpeg. A million pixels took 0.02 s, half of it for scaling the frames that are shown. The limit is
# ten times as much.
BASE_S, DECODE_S_PER_PIXEL, SCALE_S_PER_PIXEL = 30.0, 0.1e-6, 0.1e-6
# The limit of wall-clock time, as a multiple of the processor time: a busy machine takes longer.
BUSY = 10


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """The first video of an MP4. height, width: the size of a stored frame, before the display matrix turns it."""

    movie: Movie
    height: int
    width: int

    def size(self, *, rotate: bool) -> tuple[int, int]:
        """Return height and width of a frame; if `rotate`, after the display matrix turned it."""
        is_turned = rotate and self.movie.is_turned
        return (self.width, self.height) if is_turned else (self.height, self.width)

    @property
    def memory_bytes(self) -> int:
        """The address space that ffmpeg may take to decode the video."""
        return BASE_BYTES + HELD_FRAMES * RGB * self.height * self.width

    @property
    def cpu_s(self) -> float:
        """The processor time that ffmpeg may take to decode the video, in seconds."""
        seconds = self.movie.samples * DECODE_S_PER_PIXEL + self.movie.frames * SCALE_S_PER_PIXEL
        return BASE_S + seconds * self.height * self.width


def read_video_header(data: bytes | bytearray, max_frames: int) -> VideoHeader:
    """Read the index of an MP4, and the size of its frames from the settings of its codec.

    max_frames: how many frames the model takes. Raises BadRequest, TooLarge.
    """
    movie = read_movie(data, max_frames)
    with _file(data, movie) as path:
        command = _command(path, MOST_PIXELS, "-frames:v", "1", "-c", "copy", "-f", "framecrc")
        size = DIMENSIONS.search(_run(command, path, BASE_BYTES, BASE_S))
    if size is None or movie.frames == 0:
        raise BadRequest("the MP4 has no frames; send one with a video track")
    return VideoHeader(movie, int(size[2]), int(size[1]))


def read_video(data: bytes | bytearray, header: VideoHeader, *, rotate: bool) -> RawTensor:
    """Decode to uint8 `[F, H, W, 3]`: every frame that a player shows, once, in order.

    rotate: turn the frames as the display matrix says. Raises BadRequest if no frame can be decoded.
    """
    height, width = header.size(rotate=rotate)
    once = "-fps_mode", "passthrough", "-frames:v", str(header.movie.frames)
    scaled = "-vf", f"scale={width}:{height}:flags={EXACT}", "-f", "rawvideo", "-pix_fmt", "rgb24"
    with _file(data, header.movie) as path:
        command = _command(path, max(LEAST_PIXELS, 2 * height * width), *once, *scaled, rotate=rotate)
        pixels = _run(command, path, header.memory_bytes, header.cpu_s)
    decoded = len(pixels) // (height * width * RGB)
    if decoded == 0:
        raise BadRequest("no frame of the video can be decoded; send a whole MP4")
    return RawTensor((decoded, height, width, RGB), "uint8", memoryview(pixels))


def _command(path: Path, most_pixels: int, *output: str, rotate: bool = True) -> list[str]:
    """Return ffmpeg's arguments. most_pixels: the largest frame. rotate: apply the display matrix."""
    rotation = () if rotate else ("-noautorotate",)
    bounds = "-max_pixels", str(most_pixels)
    return [*INPUT, *THREADS, *rotation, *bounds, "-i", str(path), "-map", "0:V:0", *output, "-"]


def _run(command: list[str], path: Path, memory_bytes: int, cpu_s: float) -> bytes:
    """Return ffmpeg's output for the file. Raises BadRequest if ffmpeg fails or exceeds a limit."""
    inherited = [int(path.name)] if path.parent.name == "fd" else []
    limits = {"memory_bytes": memory_bytes, "cpu_s": int(cpu_s)}
    with ffmpeg.start(command, stdout=subprocess.PIPE, files=inherited, **limits) as running:
        made = b""
        try:
            made, _ = running.communicate(timeout=BUSY * cpu_s)
        except subprocess.TimeoutExpired:
            running.kill()
        except BaseException:  # this thread was interrupted; ffmpeg must not outlive it
            running.kill()
            raise
    if running.returncode < 0:  # the limit of processor time, or the timeout above
        raise BadRequest(
            "the video takes far longer to decode than other videos of its size; write it again with ffmpeg"
        )
    if running.returncode:
        raise BadRequest("the video is damaged, cut short or not of a usual codec; send a whole MP4 with a video in it")
    return made


@contextmanager
def _file(data: bytes | bytearray, movie: Movie) -> Iterator[Path]:
    """Write the file, without the boxes that ffmpeg does not need, to a place where ffmpeg can seek."""
    with memory_file() as (file, path, _):
        written = 0
        while written < len(data):
            written += file.write(memoryview(data)[written:])
        for place in movie.skipped:
            os.pwrite(file.fileno(), SKIPPED, place)
        yield path
