"""uint8 frames `[F, H, W, C]` to an H.264 MP4 that browsers play and seek."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from .. import ffmpeg
from ..errors import Impossible
from ..values import RawTensor, Rendered, RenderOptions

# Untagged video is guessed to be BT.601 or BT.709 by its size, and every wrong guess shifts the colours: say which.
# Without accurate_rnd swscale darkens each channel by about one level.
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


def render_mp4(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """A whole clip: see `render_mp4_frames`."""
    return render_mp4_frames([pixels], options)


def render_mp4_frames(chunks: Iterable[RawTensor], options: RenderOptions) -> Rendered:
    """A clip that comes in chunks of frames; the first are encoded while the later ones are still decoded.

    Quality 1 to 10 on imageio's scale: 5 is crf 25. yuv420p needs even sizes, so an odd edge is repeated once.
    """
    chunks = iter(chunks)
    first = next(chunks)
    _, height, width, channels = first.shape
    if channels != 3:
        raise Impossible(f"a video of {channels} channels has no file format; ask for output_type=pt")
    # crf 0 would be lossless, in a profile that browsers do not play.
    crf = max(1, int((1 - (5 if options.quality is None else options.quality) / 10) * 51))
    with _output_file() as path, tempfile.TemporaryFile() as errors:
        # fmt: off
        command = [
            "-v", "error", "-y",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{options.fps:g}", "-i", "pipe:0",
            "-vf", _filters(height, width), "-c:v", "libx264", "-crf", str(crf),
            "-movflags", "+faststart", "-f", "mp4", str(path),
        ]
        # fmt: on
        inherited = [int(path.name)] if path.parent.name == "fd" else []
        with ffmpeg.start(command, stdin=subprocess.PIPE, stderr=errors, files=inherited) as running:
            try:
                assert running.stdin is not None
                with suppress(BrokenPipeError):  # ffmpeg ended: its status says why
                    for chunk in chain([first], chunks):
                        running.stdin.write(chunk.data)  # the decoder's own buffer, not a copy
                    running.stdin.close()
                with suppress(BrokenPipeError):  # of what was still buffered
                    running.stdin.close()
                status = running.wait()
            except BaseException:  # no more frames will come
                running.kill()
                raise
        if status != 0:
            errors.seek(0)
            raise RuntimeError(f"ffmpeg ended with {status}: {errors.read()[-500:].decode(errors='replace')}")
        return Rendered(memoryview(path.read_bytes()), options.media_type)


@contextmanager
def _output_file() -> Iterator[Path]:
    """Where ffmpeg may seek back to put the index first: in memory on Linux, so no disk fills and nothing stays."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("video")
        try:
            yield Path(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
    else:
        with tempfile.TemporaryDirectory(prefix="vae-mp4-") as folder:
            yield Path(folder) / "video.mp4"


def _filters(height: int, width: int) -> str:
    right, bottom = width % 2, height % 2
    if not (right or bottom):
        return TO_YUV
    return f"pad={width + right}:{height + bottom},fillborders=right={right}:bottom={bottom}:mode=smear,{TO_YUV}"
