"""MP4 to pixels, by ffmpeg in a process of its own."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg

from server.errors import BadRequest
from server.types import RawTensor

# Whatever is in the file, ffmpeg reads no other file and no address, runs the decoders of the usual formats alone, and
# takes no more than this memory and time. Rotation is left alone, as EXIF is in pictures.
CODECS = "h264,hevc,av1,libdav1d,vp9,mpeg4"
INPUT = ("-v", "error", "-xerror", "-nostdin", "-noautorotate", "-f", "mov", "-protocol_whitelist", "file")
MOST_BYTES = 4 << 30
LONGEST_S = 30
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # the usual conversion darkens by about a level
DIMENSIONS = re.compile(rb"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
PACKET = re.compile(rb"^0,", re.MULTILINE)


def clip_size(data: bytes | bytearray, max_frames: int) -> tuple[int, int, int]:
    """Frames, one more than `max_frames` at most, their height and width, as the index says. Raises BadRequest."""
    listed = _ffmpeg(data, "-frames:v", str(max_frames + 1), "-c", "copy", "-f", "framecrc")
    frames, size = len(PACKET.findall(listed)), DIMENSIONS.search(listed)
    if size is None or frames == 0:
        raise BadRequest("the clip has no pictures; send an MP4 with a video in it")
    return frames, int(size[2]), int(size[1])


def read_clip(data: bytes | bytearray, frames: int, height: int, width: int) -> RawTensor:
    """uint8 `[F, H, W, 3]`, each coded frame once. Raises BadRequest."""
    passed = "-fps_mode", "passthrough", "-frames:v", str(frames), "-vf", f"scale={width}:{height}:flags={EXACT}"
    pixels = _ffmpeg(data, *passed, "-f", "rawvideo", "-pix_fmt", "rgb24", most_pixels=2 * (height + 64) * (width + 64))
    decoded = len(pixels) // (height * width * 3)
    if decoded == 0:
        raise BadRequest("no frame of the clip can be decoded; send a whole MP4")
    return RawTensor((decoded, height, width, 3), "uint8", memoryview(pixels))


def _ffmpeg(data: bytes | bytearray, *output: str, most_pixels: int = 1 << 28) -> bytes:
    """What ffmpeg makes of the clip's first video. Raises BadRequest."""
    with _input_file(data) as path:
        inherited = [int(path.name)] if path.parent.name == "fd" else []
        bounds = "-codec_whitelist", CODECS, "-max_pixels", str(most_pixels)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *INPUT, *bounds, "-i", str(path), "-map", "0:V:0", *output, "-"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=inherited,
            env={},  # and so no key
        ) as ffmpeg:
            if hasattr(resource, "prlimit"):
                resource.prlimit(ffmpeg.pid, resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
            made = b""
            try:
                made, _ = ffmpeg.communicate(timeout=LONGEST_S)
            except subprocess.TimeoutExpired:
                ffmpeg.kill()
        if ffmpeg.returncode != 0:
            raise BadRequest(
                "the clip is damaged, cut short or not of a usual codec; send a whole MP4 with a video in it"
            )
        return made


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
