"""uint8 frames `[F, H, W, C]` to an H.264 MP4 that browsers play and seek."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg

from server.errors import Impossible
from server.types import RawTensor, Rendered, RenderOptions

# Untagged video is guessed to be BT.601 or BT.709 by its size, and every wrong guess shifts the colours: say which.
# Without accurate_rnd swscale darkens each channel by about one level.
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


def render_mp4(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """Quality 1 to 10 on imageio's scale: 5 is crf 25. yuv420p needs even sizes, so an odd edge is repeated once."""
    _, height, width, channels = pixels.shape
    if channels != 3:
        raise Impossible(f"a video of {channels} channels has no file format; ask for output_type=pt")
    # crf 0 would be lossless, in a profile that browsers do not play.
    crf = max(1, int((1 - (5 if options.quality is None else options.quality) / 10) * 51))
    with tempfile.TemporaryDirectory(prefix="vae-mp4-") as folder:
        path = Path(folder) / "video.mp4"
        # fmt: off
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{options.fps:g}", "-i", "pipe:0",
            "-vf", _filters(height, width), "-c:v", "libx264", "-crf", str(crf),
            "-movflags", "+faststart", str(path),
        ]
        # fmt: on
        # ffmpeg reads the decoder's own buffer: the frames are never held twice.
        ran = subprocess.run(command, input=memoryview(pixels.data), capture_output=True, check=False)
        if ran.returncode != 0:
            raise RuntimeError(f"ffmpeg ended with {ran.returncode}: {ran.stderr.decode(errors='replace')[-500:]}")
        return Rendered(path.read_bytes(), options.media_type)


def _filters(height: int, width: int) -> str:
    right, bottom = width % 2, height % 2
    if not (right or bottom):
        return TO_YUV
    return f"pad={width + right}:{height + bottom},fillborders=right={right}:bottom={bottom}:mode=smear,{TO_YUV}"
