"""MP4 to pixels, by ffmpeg in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg

from server.errors import BadRequest
from server.types import RawTensor

# The demuxer is named and the protocols are few: a playlist in disguise could make ffmpeg read files and addresses.
# Rotation is left alone, as EXIF is in pictures.
INPUT = ("-v", "error", "-xerror", "-nostdin", "-noautorotate", "-f", "mov", "-protocol_whitelist", "file")
LONGEST_S = 30
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # the usual conversion darkens by about a level
DIMENSIONS = re.compile(rb"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
PACKET = re.compile(rb"^0,", re.MULTILINE)


def clip_size(data: bytes | bytearray) -> tuple[int, int, int]:
    """Frames, height and width, from the index: nothing is decoded. Raises BadRequest."""
    listed = _ffmpeg(data, "-c", "copy", "-f", "framecrc")
    frames, size = len(PACKET.findall(listed)), DIMENSIONS.search(listed)
    if size is None or frames == 0:
        raise BadRequest("the clip has no pictures; send an MP4 with a video in it")
    return frames, int(size[2]), int(size[1])


def read_clip(data: bytes | bytearray, frames: int, height: int, width: int) -> RawTensor:
    """uint8 `[F, H, W, 3]`, each coded frame once. Raises BadRequest."""
    scale = f"scale={width}:{height}:flags={EXACT}"
    passed = "-fps_mode", "passthrough", "-frames:v", str(frames), "-vf", scale
    pixels = _ffmpeg(data, *passed, "-f", "rawvideo", "-pix_fmt", "rgb24")
    decoded = len(pixels) // (height * width * 3)
    if decoded == 0:
        raise BadRequest("no frame of the clip can be decoded; send a whole MP4")
    return RawTensor((decoded, height, width, 3), "uint8", memoryview(pixels))


def _ffmpeg(data: bytes | bytearray, *output: str) -> bytes:
    """What ffmpeg makes of the clip's first video. Raises BadRequest."""
    with _input_file(data) as path:
        inherited = [int(path.name)] if path.parent.name == "fd" else []
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *INPUT, "-i", str(path), "-map", "0:v:0", *output, "pipe:1"]
        try:
            return subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=inherited, timeout=LONGEST_S,
                check=True,
            ).stdout  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            raise BadRequest("the clip is damaged, cut short or has no pictures; send a whole MP4") from None


@contextmanager
def _input_file(data: bytes | bytearray) -> Iterator[Path]:
    """Where ffmpeg may seek: in memory on Linux, so no disk fills and nothing stays."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("clip"), "wb") as file:
            file.write(data)
            file.flush()
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.TemporaryDirectory(prefix="vae-clip-") as folder:
            path = Path(folder) / "clip.mp4"
            path.write_bytes(data)
            yield path
