"""MP4s: real ones that ffmpeg writes, and made by hand, a box at a time."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg

H264 = ("-c:v", "libx264", "-g", "25", "-sc_threshold", "0", "-bf", "3", "-pix_fmt", "yuv420p")


def ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def source(seconds: float = 4, rate: str = "25", size: str = "96x64") -> tuple[str, ...]:
    """Moving colours without edges, because programs differ in how they sharpen those."""
    return "-f", "lavfi", "-i", f"gradients=size={size}:rate={rate}:duration={seconds}:speed=0.05:seed=3"


def write(path: Path, *arguments: object) -> Path:
    ffmpeg(*arguments, path)
    return path


def frames_of(path: Path, *output: str) -> list[str]:
    """The checksum of each frame that ffmpeg shows, with nothing hidden from it and no limits."""
    shown = "-map", "0:V:0", "-fps_mode", "passthrough", *output, "-c:v", "rawvideo", "-pix_fmt", "rgb24"
    told = ffmpeg("-i", path, *shown, "-f", "framemd5", "-").decode()
    return [line.split()[-1] for line in told.splitlines() if not line.startswith("#")]


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def full(kind: bytes, *content: bytes, version: int = 0) -> bytes:
    """A box with a version and flags."""
    return box(kind, struct.pack(">I", version << 24), *content)


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


IDENTITY = numbers(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
FTYP = box(b"ftyp", b"isom", numbers(512), b"isomavc1")
MVHD = full(b"mvhd", numbers(0, 0, 1000, 0, 1 << 16, 1 << 24, 0, 0), IDENTITY, bytes(24), numbers(2))
TKHD = full(b"tkhd", numbers(0, 0, 1, 0, 0, 0, 0, 0, 0), IDENTITY, numbers(64 << 16, 64 << 16))
MDHD = full(b"mdhd", numbers(0, 0, 25, 0, 0))
VIDEO_HDLR = full(b"hdlr", bytes(4), b"vide", bytes(13))
SOUND_HDLR = full(b"hdlr", bytes(4), b"soun", bytes(13))


def sample_entry(*boxes: bytes) -> bytes:
    return box(b"avc1", bytes(24), struct.pack(">HH", 64, 64), bytes(50), *boxes)


def stsd(*boxes: bytes) -> bytes:
    return full(b"stsd", numbers(1), sample_entry(*boxes))


def table(kind: bytes, *entries: bytes) -> bytes:
    return full(kind, numbers(len(entries)), *entries)


def few(**changed: bytes) -> list[bytes]:
    """The tables of three samples. changed: those that are others, empty for none."""
    tables = {
        "stsd": stsd(),
        "stts": table(b"stts", numbers(3, 1)),
        "stsz": full(b"stsz", numbers(1, 3)),
        "stsc": table(b"stsc", numbers(1, 3, 1)),
        "stco": table(b"stco", numbers(64)),
    }
    return [found for found in (tables | changed).values() if found]


def trak(tables: list[bytes], *more: bytes, hdlr: bytes = VIDEO_HDLR) -> bytes:
    return box(b"trak", TKHD, *more, box(b"mdia", MDHD, hdlr, box(b"minf", box(b"stbl", *tables))))


def edited(*edits: tuple[int, int], version: int = 0) -> bytes:
    """edits: each the milliseconds that it lasts, and the frame that it starts with, -1 for a pause."""
    layout = ">Qqi" if version else ">Iii"
    entries = [struct.pack(layout, lasts, start, 1 << 16) for lasts, start in edits]
    return box(b"edts", full(b"elst", numbers(len(entries)), *entries, version=version))


MVEX = box(b"mvex", full(b"trex", numbers(1, 1, 1, 1, 0)))


def moof(*runs: bytes, track: int = 1) -> bytes:
    return box(b"moof", full(b"mfhd", numbers(1)), box(b"traf", full(b"tfhd", numbers(track)), *runs))


def movie(*boxes: bytes) -> bytes:
    return FTYP + box(b"moov", MVHD, *boxes) + box(b"mdat", bytes(64))
