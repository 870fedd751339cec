"""Render uint8 frames `[F, H, W, C]` as an H.264 MP4 that browsers can play and seek in."""

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

# The colour space is written into the file. Without it, players guess BT.601 or BT.709 from the size of the video, and
# a wrong guess shifts the colours. Without accurate_rnd, swscale darkens each channel by about one level.
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


def render_mp4(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """Render a whole video as `render_mp4_frames` does."""
    return render_mp4_frames([pixels], options)


def render_mp4_frames(chunks: Iterable[RawTensor], options: RenderOptions) -> Rendered:
    """Render a video from chunks of frames. The first chunks are encoded while later ones are still being decoded.

    options: `quality` is 1 to 10 on imageio's scale; the default 5 means crf 25. `fps` is the frame rate.
    If a side is odd, its last row or column is repeated once, because yuv420p needs even sizes.
    Raises Impossible unless there are 3 channels, RuntimeError if ffmpeg fails, and whatever `chunks` raises.
    """
    chunks = iter(chunks)
    first = next(chunks)
    _, height, width, channels = first.shape
    if channels != 3:
        raise Impossible(f"a video of {channels} channels has no file format; ask for output_type=pt")
    # At least 1: crf 0 is lossless and needs a profile that browsers do not play.
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
                with suppress(BrokenPipeError):  # ffmpeg ended early; its exit status tells the reason
                    for chunk in chain([first], chunks):
                        running.stdin.write(chunk.data)  # without copying the decoder's buffer
                    running.stdin.close()
                with suppress(BrokenPipeError):  # closing again: the first close may have failed to flush
                    running.stdin.close()
                status = running.wait()
            except BaseException:  # no more frames will come, so ffmpeg would wait forever
                running.kill()
                raise
        if status != 0:
            errors.seek(0)
            raise RuntimeError(f"ffmpeg ended with status {status}: {errors.read()[-500:].decode(errors='replace')}")
        return Rendered(memoryview(path.read_bytes()), options.media_type)


@contextmanager
def _output_file() -> Iterator[Path]:
    """Create the output file, in which ffmpeg seeks back at the end to move the index to the start.

    On Linux it is in memory, so that it fills no disk and nothing is left behind if this process is killed.
    """
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
