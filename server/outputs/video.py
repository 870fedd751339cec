"""Render uint8 frames `[F, H, W, C]` as an H.264 MP4 that browsers can play and seek in."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from typing import IO

from .. import ffmpeg
from ..errors import Impossible
from ..memory_file import memory_file
from ..own_thread import in_own_thread
from ..values import RawTensor, Rendered, RenderOptions

# The colour space is written into the file. Without it, players guess BT.601 or BT.709 from the size of the video, and
# a wrong guess shifts the colours. Without accurate_rnd, swscale darkens each channel by about one level.
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


# A fragment for each frame, none of which waits for later frames: no look-ahead, and no frame that refers to a later
# one. ffmpeg itself holds each frame back until the next one comes. Files are 1.2 to 2 times as large.
FRAGMENTED = (
    "-tune", "zerolatency", "-fps_mode", "passthrough", "-flush_packets", "1",
    "-movflags", "frag_every_frame+empty_moov+default_base_moof",
)  # fmt: skip
PIECE_BYTES = 64 << 10


def render_mp4(pixels: RawTensor, options: RenderOptions) -> Rendered:
    """Render a whole video as `render_mp4_frames` does."""
    return render_mp4_frames([pixels], options)


def render_mp4_frames(chunks: Iterable[RawTensor], options: RenderOptions) -> Rendered:
    """Render a video from chunks of frames. The first chunks are encoded while later ones are still being decoded.

    options: `quality` is 1 to 10 on imageio's scale; the default 5 means crf 25. `fps` is the frame rate.
    If a side is odd, its last row or column is repeated once, because yuv420p needs even sizes.
    Raises Impossible unless there are 3 channels, RuntimeError if ffmpeg fails, and whatever `chunks` raises.
    """
    command, chunks = _command(chunks, options)
    # ffmpeg seeks back in it at the end, to move the index to the start.
    with memory_file() as (_, path, inherited), tempfile.TemporaryFile() as errors:
        command += ["-y", "-movflags", "+faststart", "-f", "mp4", str(path)]
        with ffmpeg.start(command, stdin=subprocess.PIPE, stderr=errors, files=inherited) as running:
            try:
                _write(running, chunks)
                running.wait()
            except BaseException:  # no more frames will come, so ffmpeg would wait forever
                running.kill()
                raise
        _check(running, errors)
        return Rendered(memoryview(path.read_bytes()), options.media_type)


def with_sound(mp4: memoryview, wav: memoryview) -> memoryview:
    """Return an MP4 with the video of `mp4`, bit for bit, and the sound of `wav` as AAC.

    It is as long as the longer one of both. Raises RuntimeError if ffmpeg fails.
    """
    with ExitStack() as files, tempfile.TemporaryFile() as errors:
        made = [files.enter_context(memory_file()) for _ in range(3)]
        video, sound, out = (each.path for each in made)
        video.write_bytes(mp4)
        sound.write_bytes(wav)
        inherited = [number for each in made for number in each.descriptors]
        # fmt: off
        command = [
            "-v", "error", "-f", "mp4", "-i", str(video), "-f", "wav", "-i", str(sound),
            "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", "-b:a", "192k",
            "-y", "-movflags", "+faststart", "-f", "mp4", str(out),
        ]
        # fmt: on
        with ffmpeg.start(command, stderr=errors, files=inherited) as running:
            try:
                running.wait()
            except BaseException:  # this thread was interrupted; ffmpeg must not outlive it
                running.kill()
                raise
        _check(running, errors)
        return memoryview(out.read_bytes())


def stream_mp4_frames(chunks: Iterable[RawTensor], options: RenderOptions) -> Iterator[bytes]:
    """Yield a fragmented MP4 piece by piece, while the frames come. Arguments and errors as for `render_mp4_frames`.

    The fragment of a frame is yielded once the next frame has come.
    """
    command, chunks = _command(chunks, options)
    with tempfile.TemporaryFile() as errors:
        command += [*FRAGMENTED, "-f", "mp4", "pipe:1"]
        with ffmpeg.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as running:
            assert running.stdout is not None
            writing = in_own_thread("frames", partial(_write, running, chunks))
            # If no more frames will come, ffmpeg would wait forever.
            writing.add_done_callback(lambda written: running.kill() if written.exception() else None)
            try:
                while piece := os.read(running.stdout.fileno(), PIECE_BYTES):
                    yield piece
                writing.result()
                running.wait()
            except BaseException:  # also when nobody reads on: ffmpeg would wait forever
                running.kill()
                raise
        _check(running, errors)


def render_fragmented_mp4(chunks: Iterable[RawTensor], options: RenderOptions) -> Rendered:
    """Render what `stream_mp4_frames` yields as a whole."""
    return Rendered(memoryview(b"".join(stream_mp4_frames(chunks, options))), options.media_type)


def _command(chunks: Iterable[RawTensor], options: RenderOptions) -> tuple[list[str], Iterator[RawTensor]]:
    """Return ffmpeg's arguments without those of the output, and all chunks."""
    chunks = iter(chunks)
    first = next(chunks)
    _, height, width, channels = first.shape
    if channels != 3:
        raise Impossible(f"a video of {channels} channels has no file format; ask for output_type=pt")
    # At least 1: crf 0 is lossless and needs a profile that browsers do not play.
    crf = max(1, int((1 - (5 if options.quality is None else options.quality) / 10) * 51))
    # fmt: off
    command = [
        "-v", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{options.fps:g}", "-i", "pipe:0",
        "-vf", _filters(height, width), "-c:v", "libx264", "-crf", str(crf),
    ]
    # fmt: on
    return command, chain([first], chunks)


def _write(running: subprocess.Popen[bytes], chunks: Iterable[RawTensor]) -> None:
    """Write all frames to ffmpeg, and close its input."""
    assert running.stdin is not None
    with suppress(BrokenPipeError):  # ffmpeg ended early; its exit status tells the reason
        for chunk in chunks:
            running.stdin.write(chunk.data)  # without copying the decoder's buffer
            running.stdin.flush()
        running.stdin.close()
    with suppress(BrokenPipeError):  # closing again: the first close may have failed to flush
        running.stdin.close()


def _check(running: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    if running.returncode != 0:
        errors.seek(0)
        tail = errors.read()[-500:].decode(errors="replace")
        raise RuntimeError(f"ffmpeg ended with status {running.returncode}: {tail}")


def _filters(height: int, width: int) -> str:
    right, bottom = width % 2, height % 2
    if not (right or bottom):
        return TO_YUV
    return f"pad={width + right}:{height + bottom},fillborders=right={right}:bottom={bottom}:mode=smear,{TO_YUV}"
