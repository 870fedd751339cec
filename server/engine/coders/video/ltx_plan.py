"""How much memory a decode of LTX-Video or LTX-2 needs, and how to split it."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.causal_kernels import TAPS
from .causal_plan import SMALLEST_BAND, SMALLEST_SLAB
from .ltx_layers import Enlarge, FramesConv, FramesDecoder, FramesResnet, Last
from .ltx_passes import most_frames

# The bands that a step holds: the window, the same three times side by side, the normalized rows in float32 (two), and
# its output, which has up to eight times the channels where it is unfolded.
WORKING_BANDS = 14


@dataclass(frozen=True)
class Plan:
    """How to split one decode.

    slab_rows: latent rows together. chunk_bytes: as `decode_frames` takes it. band_bytes: size of a band of rows.
    peak_bytes: the memory beside the output.
    """

    slab_rows: int
    chunk_bytes: int
    band_bytes: int
    peak_bytes: int


def halo_rows(decoder: FramesDecoder) -> int:
    """Return how many latent rows above and below a slab have an influence on its pixels."""
    rows = 0
    for step in reversed(decoder.steps):
        match step:
            case FramesResnet():
                rows += 2
            case Enlarge():
                rows = -(-rows // step.size) + 1
            case FramesConv() | Last():
                rows += 1
    return rows


def needed_bytes(decoder: FramesDecoder, frames: int, rows: int, width: int, chunk_bytes: int) -> int:
    """Return the memory that a decode of `frames` latent frames of this size needs beside latents and output.

    It is what the steps remember, the chunks that wait while a part of them is computed, and the largest activations
    of one step. The bands of rows come on top.
    """
    itemsize, pixels = decoder.dtype.itemsize, rows * width
    remembered = waiting = working = 0
    for step in decoder.steps:
        conv = step.conv if isinstance(step, Enlarge | Last) else step.conv1 if isinstance(step, FramesResnet) else step
        channels, out_channels = conv.in_channels, conv.out_channels
        most = most_frames(step, pixels, itemsize, chunk_bytes)
        if frames > most:
            waiting += frames * pixels * channels
            frames = most
        kept = (TAPS - 1) * pixels * channels  # the frames before this chunk; those before the next one are new
        match step:
            case FramesResnet():
                made = (frames + step.lag) * pixels * out_channels
                waits = (
                    made if step.lag else 0
                )  # after the last chunk, a step makes more frames than the next one takes
                shortcut = made + frames * pixels * channels if step.shortcut else 0
                remembered += kept + (TAPS - 1 + step.lag) * pixels * out_channels
                held = frames * pixels * channels + 2 * made + waits + shortcut
            case Enlarge():
                made = (frames + conv.lag) * pixels * out_channels
                remembered += kept
                held = frames * pixels * channels + made
                frames, pixels = frames * step.times, pixels * step.size**2
            case FramesConv() | Last():
                remembered += kept
                held = frames * pixels * channels + 2 * (frames + conv.lag) * pixels * out_channels
        working = max(working, held + kept)
    return (remembered + waiting + working) * itemsize


def fit(
    decoder: FramesDecoder, shape: tuple[int, int, int], budget_bytes: int, chunk_bytes: int, band_bytes: int
) -> Plan:
    """Return the plan for latents of shape (F, h, w): whole frames in large chunks, if the memory allows it.

    Smaller chunks of frames come first, because they compute nothing twice; then slabs of rows. chunk_bytes,
    band_bytes: the wanted sizes. If even the smallest plan exceeds the budget, it is returned nevertheless, because the
    run may still fit and no plan needs less.
    """
    frames, height, width = shape
    smallest = band_bytes // SMALLEST_BAND
    budget, halo = budget_bytes - WORKING_BANDS * smallest, 2 * halo_rows(decoder)
    rows = height
    if needed_bytes(decoder, frames, height, width, 1) > budget:
        row_bytes = needed_bytes(decoder, frames, 1, width, 1)
        rows = min(height, max(SMALLEST_SLAB, budget // row_bytes - halo))
    computed = min(height, rows + halo)
    while chunk_bytes > 1 and needed_bytes(decoder, frames, computed, width, chunk_bytes) > budget:
        chunk_bytes //= 2
    held = needed_bytes(decoder, frames, computed, width, chunk_bytes)
    band_bytes = max(smallest, min(band_bytes, (budget_bytes - held) // WORKING_BANDS))
    return Plan(rows, chunk_bytes, band_bytes, held + WORKING_BANDS * band_bytes)
