"""How much memory a causal decode needs, and how many rows it can decode together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...kernels.causal_kernels import TAPS
from .causal_layers import Attention, CausalDecoder, Resnet, Unfold, Upsample

# The bands that a causal convolution holds: the window, the same three times side by side, the normalized rows in
# float32 (two), and its output, with one to spare.
WORKING_BANDS = 8
SMALLEST_BAND_BYTES = 1 << 20
SMALLEST_SLAB = 4  # latent rows; with fewer, the rows around them cost more time than they save memory


def halo_rows(decoder: CausalDecoder) -> int:
    """Return how many latent rows above and below a slab have an influence on its pixels."""
    rows = 1  # of the last convolution
    for block in reversed(decoder.tail):
        for step in reversed(block.steps):
            match step:
                case Resnet():
                    rows += 2
                case Upsample():
                    rows = -(-(rows + 1) // 2)  # a 3x3 convolution after the nearest upsampling
                case Unfold():
                    rows = -(-rows // 2) + 1  # a 3x3 convolution before the unfolding
                case Attention():
                    raise AssertionError("no attention comes after the head")
    return rows


def tail_bytes(decoder: CausalDecoder, rows: int, width: int) -> int:
    """Return the memory that the tail needs for latent rows of this width, one latent frame at a time.

    It is what the causal layers remember (two frames each; for the layer that runs, those before and after it) and the
    largest activations of one layer. The bands of rows come on top.
    """
    frames, pixels, channels = 1, rows * width, decoder.head_channels
    past, working = 0, frames * pixels * channels
    for block in decoder.tail:
        entered = frames * pixels * channels if block.shortcut else 0
        for step in block.steps:
            match step:
                case Resnet():
                    past += (TAPS - 1) * pixels * (channels + step.conv1.out_channels)
                    widest = max(channels, step.conv1.out_channels)
                    held = frames * pixels * (channels + 2 * step.conv1.out_channels) + (TAPS - 1) * pixels * widest
                    working = max(working, entered + held)
                    channels = step.conv1.out_channels
                case Upsample():
                    if step.time is not None:
                        past += (TAPS - 1) * pixels * channels
                        working = max(working, entered + frames * pixels * channels * (1 + 2 * TAPS))
                        frames *= 2
                    before = frames * pixels * channels
                    pixels, channels = 4 * pixels, step.out_channels
                    working = max(working, entered + before + frames * pixels * channels * 3 // 2)
                case Unfold():
                    past += (TAPS - 1) * pixels * channels
                    unfolded = frames * pixels * (channels + step.conv.out_channels) + (TAPS - 1) * pixels * channels
                    frames, pixels, channels = frames * step.times, 4 * pixels, step.out_channels
                    working = max(working, unfolded + 2 * frames * pixels * channels)
                case Attention():
                    raise AssertionError("no attention comes after the head")
    past += (TAPS - 1) * pixels * channels
    last = frames * pixels * (channels + 3 * decoder.conv_out.out_channels) + (TAPS - 1) * pixels * channels
    working = max(working, last)
    return (past + working) * decoder.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """How to split one decode. slab_rows: latent rows of the tail together. band_bytes: size of a band of rows."""

    slab_rows: int
    band_bytes: int


def held_bytes(decoder: CausalDecoder, height: int, width: int) -> Callable[[int], int]:
    """Return a function from the rows of a slab to the bytes that its tail holds, without the bands of rows.

    height, width: the size of the latents. A slab of `height` rows means whole frames.
    """
    halo = halo_rows(decoder)

    def held(rows: int) -> int:
        return tail_bytes(decoder, min(height, rows + 2 * halo), width)

    return held


def fit(held: Callable[[int], int], height: int, budget_bytes: int, band_bytes: int) -> Plan:
    """Return the plan for frames of this height: whole frames, if the memory allows it, else slabs of rows.

    held: the bytes that slabs of some rows need, without the bands. band_bytes: the wanted size of a band. If even the
    smallest plan exceeds the budget, it is returned nevertheless, because the run may still fit and no plan needs less.
    """
    smallest = min(band_bytes, SMALLEST_BAND_BYTES)
    available = budget_bytes - WORKING_BANDS * smallest
    lowest = min(height, SMALLEST_SLAB)
    rows = next((rows for rows in range(height, lowest, -1) if held(rows) <= available), lowest)
    return Plan(rows, max(smallest, min(band_bytes, (budget_bytes - held(rows)) // WORKING_BANDS)))
