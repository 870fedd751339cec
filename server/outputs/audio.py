"""Render a waveform `[1, channels, samples]`, float32 in [-1, 1], as WAV or FLAC with 16 bits per sample."""

from __future__ import annotations

import io
import subprocess
import wave

import numpy as np
from numpy.typing import NDArray

from .. import ffmpeg
from ..memory_file import memory_file
from ..values import RawTensor, Rendered, RenderOptions

SAMPLE_BYTES = 2
LARGEST = 32767


def render_wav(waveform: RawTensor, options: RenderOptions) -> Rendered:
    """Render a WAV file of PCM samples. options: `sampling_rate` in Hz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(waveform.shape[1])
        file.setsampwidth(SAMPLE_BYTES)
        file.setframerate(options.sampling_rate)
        file.writeframes(as_pcm(waveform))
    return Rendered(buffer.getbuffer(), options.media_type)


def render_flac(waveform: RawTensor, options: RenderOptions) -> Rendered:
    """Render a FLAC file with the same samples as the WAV file. Raises RuntimeError if ffmpeg fails.

    ffmpeg writes to a file in which it can seek, so that the number of samples is in the header.
    """
    wav = render_wav(waveform, options).body
    with memory_file() as (_, path, inherited):
        command = ["-v", "error", "-f", "wav", "-i", "pipe:0", "-c:a", "flac", "-y", "-f", "flac", str(path)]
        with ffmpeg.start(command, stdin=subprocess.PIPE, files=inherited) as running:
            try:
                running.communicate(bytes(wav))
            except BaseException:  # this thread was interrupted; ffmpeg must not outlive it
                running.kill()
                raise
        if running.returncode:
            raise RuntimeError(f"ffmpeg ended with status {running.returncode} while it wrote a FLAC file")
        return Rendered(memoryview(path.read_bytes()), options.media_type)


def as_pcm(waveform: RawTensor) -> memoryview:
    """Return the samples as little-endian 16-bit integers, the channels of each moment side by side.

    1.0 becomes 32767. What is louder is clipped.
    """
    _, channels, samples = waveform.shape
    values: NDArray[np.float32] = np.frombuffer(waveform.data, np.float32).reshape(channels, samples)
    pcm = np.rint(values.clip(-1, 1).T * LARGEST).astype("<i2", order="C")  # [samples, channels]
    return memoryview(pcm).cast("B") if pcm.size else memoryview(b"")
