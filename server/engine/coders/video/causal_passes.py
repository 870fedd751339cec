"""A causal decoder, layer by layer, on one chunk of frames. Nothing here is approximate.

Every layer works on bands of rows that stay in the processor's caches. A 3x3 convolution needs one row of its input
above and one below a band; these rows are normalized again for the neighbouring band. A causal convolution also needs
the two frames before the chunk, normalized: `Past` keeps them. Rows around the image are written into the window of the
band at the edge. Columns of zeros around it are the convolution's own padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.causal_kernels import TAPS, CausalKernels, side_by_side
from ..image.layers import Linear
from ..interface import Check
from .causal_layers import (
    Attention,
    Block,
    CausalConv,
    CausalDecoder,
    Duplicate,
    PixelNorm,
    Resnet,
    Unfold,
    Upsample,
)

ZERO, REPEATED, REFLECTED = range(3)
"""What lies around an image: zeros, its first and last rows and columns, or those next to them, as in a mirror."""

Fill = Callable[[int, int, Tensor], None]
"""Writes rows [top, bottom) of a layer's input, for all frames of the chunk, into a tensor `[n, rows, W, C]`."""


@dataclass
class Past:
    """What the layers remember of earlier chunks: for each causal layer, the last two frames of its input."""

    frames: dict[int, Tensor] = field(default_factory=dict)  # by layer, [2, H, W, C]

    def of(self, layer: object) -> Tensor | None:
        """Return the last two frames that a layer saw; None before the first chunk."""
        return self.frames.get(id(layer))

    def keep(self, layer: object, frames: Tensor) -> None:
        """Remember the last two frames of a layer's input."""
        self.frames[id(layer)] = frames


@dataclass(frozen=True)
class Run:
    """One decode: its kernels, the size of a band, and the check between bands."""

    kernels: CausalKernels
    band_bytes: int
    query_bytes: int
    check: Check

    def bands(self, frames: int, height: int, row_values: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Yield bands [top, bottom) of an image. row_values: values of one row of one frame at the layer's widest."""
        rows = max(1, self.band_bytes // (frames * row_values * itemsize))
        for top in range(0, height, rows):
            self.check()
            yield top, min(top + rows, height)


def decode_head(decoder: CausalDecoder, run: Run, past: Past, latents: Tensor) -> Tensor:
    """Run the layers that must see whole frames on the next latent frames, `[n, h, w, C]` -> `[n, h, w, C']`.

    The first call must have the first latent frame only.
    """
    is_first = past.of(decoder.conv_in) is None
    x = latents if decoder.post_quant is None else F.linear(latents, decoder.post_quant.weight, decoder.post_quant.bias)
    z = x
    x = conv(decoder.conv_in, run, past, z, plain(z))  # [n, h, w, C]
    if decoder.repeats_input:
        x += z.repeat_interleave(decoder.repeats_input, -1)
    for block in decoder.head:
        x = advance(block, run, past, x, is_first)
    return x


def decode_tail(decoder: CausalDecoder, run: Run, past: Past, x: Tensor) -> Tensor:
    """Run the other layers on the output of `decode_head`, or on some rows of it: `[n, h, w, C]` -> `[n', H, W, 3]`.

    x is overwritten.
    """
    is_first = past.of(decoder.conv_out) is None
    for block in decoder.tail:
        x = advance(block, run, past, x, is_first)
    sample = conv(decoder.conv_out, run, past, x, normalized(decoder.norm_out, run, x))
    sample = unpatch(sample, decoder.patch)
    return sample.clamp_(-1, 1) if decoder.clamps else sample


def advance(block: Block, run: Run, past: Past, x: Tensor, is_first: bool) -> Tensor:
    """Run the layers of a block, and add its shortcut."""
    entered = x.clone() if block.shortcut is not None else None  # resnets add to x in place
    for step in block.steps:
        match step:
            case Resnet():
                x = resnet(step, run, past, x)
            case Attention():
                x = attention(step, run, past, x)
            case Upsample():
                x = upsample(step, run, past, x, is_first)
            case Unfold():
                x = unfold(step, run, past, x, is_first)
    if block.shortcut is not None and entered is not None:
        add_duplicates_(x, entered, block.shortcut, is_first)
    return x


def plain(x: Tensor) -> Fill:
    """Return how x itself is written for a band."""

    def fill(top: int, bottom: int, out: Tensor) -> None:
        out.copy_(x[:, top:bottom])

    return fill


def normalized(norm: PixelNorm, run: Run, x: Tensor) -> Fill:
    """Return how silu(norm(x)) is written for a band."""

    def fill(top: int, bottom: int, out: Tensor) -> None:
        run.kernels.norm_silu(x[:, top:bottom], norm.weight, norm.bias, out)

    return fill


def conv(
    layer: CausalConv, run: Run, past: Past, x: Tensor, fill: Fill, total: Tensor | None = None
) -> Tensor:  # [n, H, W, C] -> [n, H, W, C']
    """Run a causal convolution over the rows that `fill` writes. total: the output is added to it, in place."""
    n, height, width, channels = x.shape
    before, edge = past.of(layer), int(layer.replicates)
    frames = n if before is None else n + TAPS - 1
    columns = slice(edge, width + edge)
    out = x.new_empty(n, height, width, layer.out_channels) if total is None else total
    kept = x.new_empty(TAPS - 1, height, width, channels)  # [2, H, W, C]
    for top, bottom in run.bands(frames, height, width * channels, x.element_size()):
        above, below = max(top - 1, 0), min(bottom + 1, height)
        window = x.new_empty(frames, bottom - top + 2, width + 2 * edge, channels)  # [n + 2, r + 2, W (+ 2), C]
        rows = slice(above - top + 1, below - top + 1)
        fill(above, below, window[frames - n :, rows, columns])
        if before is not None:
            window[: TAPS - 1, rows, columns] = before[:, above:below]
        kept[:, top:bottom] = _last_two(window[:, 1:-1, columns], layer.replicates)
        fill_edges(window, REPEATED if layer.replicates else ZERO, is_top=top == 0, is_bottom=bottom == height)
        band = (
            run.kernels.conv_first(window, layer.first, layer.bias, 1 - edge)
            if before is None
            else run.kernels.conv(window, layer.weight, layer.bias, 1 - edge)
        )  # [n, r, W, C']
        if total is None:
            out[:, top:bottom] = band
        else:
            out[:, top:bottom] += band
    past.keep(layer, kept)
    return out


def _last_two(window: Tensor, replicates: bool) -> Tensor:
    """Return the last two frames; the frame before the first one of a video repeats it, or is zero."""
    if len(window) > 1:
        return window[-2:]
    return torch.cat([window if replicates else torch.zeros_like(window), window])


def fill_edges(window: Tensor, edge: int, *, is_top: bool, is_bottom: bool) -> None:  # [n, r + 2, W (+ 2), C]
    """Write the rows and columns around the image into a window; columns of zeros are the convolution's own.

    edge: what lies around the image: ZERO, REPEATED or REFLECTED.
    """
    if edge != ZERO:
        window[:, :, 0], window[:, :, -1] = window[:, :, edge], window[:, :, -1 - edge]
    if is_top:
        window[:, 0] = window[:, edge] if edge != ZERO else 0
    if is_bottom:
        window[:, -1] = window[:, -1 - edge] if edge != ZERO else 0


def resnet(block: Resnet, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n, H, W, C']
    """Run a residual block. x is overwritten."""
    hidden = conv(block.conv1, run, past, x, normalized(block.norm1, run, x))
    if block.shortcut is not None:
        x = F.linear(x, block.shortcut.weight, block.shortcut.bias)  # [n, H, W, C']
    return conv(block.conv2, run, past, hidden, normalized(block.norm2, run, hidden), total=x)


def attention(block: Attention, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, h, w, C]
    """Attend within each frame, or to all frames so far. x is overwritten."""
    for frame in x.flatten(1, 2):  # [h w, C]
        tokens = run.kernels.norm(frame[None, None], block.norm.weight, block.norm.bias)[0]  # [1, h w, C]
        key = F.linear(tokens, block.key.weight, block.key.bias)  # [1, h w, C]
        value = F.linear(tokens, block.value.weight, block.value.bias)  # [1, h w, C]
        if block.sees_past:
            if (before := past.of(block)) is not None:
                key, value = torch.cat([before[:1], key], 1), torch.cat([before[1:], value], 1)  # [1, F h w, C]
            past.keep(block, torch.cat([key, value]))  # [2, F h w, C]
        rows = max(1, run.query_bytes // (key.shape[1] * x.element_size()))
        for start in range(0, len(frame), rows):
            run.check()
            query = F.linear(tokens[:, start : start + rows], block.query.weight, block.query.bias)  # [1, t, C]
            frame[start : start + rows] += run.kernels.kernels.attend(query, key, value)[0].add_(block.bias)
    return x


def upsample(step: Upsample, run: Run, past: Past, x: Tensor, is_first: bool) -> Tensor:
    """Double the frames (except the first one of a video), the rows and the columns."""
    if step.time is not None:
        x = double_frames(step.time, past, x, is_first)
    n, height, width, _ = x.shape
    out = x.new_empty(n, 2 * height, 2 * width, step.out_channels)
    widest = width * max(x.shape[-1], 4 * step.out_channels)
    for top, bottom in run.bands(n, height, widest, x.element_size()):
        above, below = max(top - 1, 0), min(bottom + 1, height)
        window = x.new_empty(n, bottom - top + 2, width, x.shape[-1])  # [n, r + 2, W, C]
        if top == 0:
            window[:, 0] = 0
        if bottom == height:
            window[:, -1] = 0
        window[:, above - top + 1 : below - top + 1] = x[:, above:below]
        phases = run.kernels.kernels.conv(window, step.space, None)  # [n, r + 1, W + 1, 4 C']
        band, _ = run.kernels.kernels.interleave(phases, step.bias, 2 * (bottom - top))  # [n, 2 r, 2 W, C']
        out[:, 2 * top : 2 * bottom] = band
    return out


def double_frames(time: Linear, past: Past, x: Tensor, is_first: bool) -> Tensor:  # [n, H, W, C] -> [2 n, H, W, C]
    """Compute two frames from each frame and the two before it. The first frame of a video stays single."""
    if is_first:
        past.keep(time, x.new_zeros(2, *x.shape[1:]))  # the first frame is no past of the others
        return x
    before = past.of(time)
    assert before is not None
    window = torch.cat([before, x])  # [n + 2, H, W, C]
    past.keep(time, window[-2:].clone())
    doubled = F.linear(side_by_side(window, len(x), TAPS), time.weight, time.bias)  # [n, H, W, 2 C]
    n, height, width, channels = x.shape
    pairs = doubled.view(n, height, width, 2, channels).permute(0, 3, 1, 2, 4)  # [n, 2, H, W, C]
    return pairs.reshape(2 * n, height, width, channels)


def unfold(step: Unfold, run: Run, past: Past, x: Tensor, is_first: bool) -> Tensor:
    """Double rows and columns, and the frames except the first one of a video."""
    times = 1 if is_first else step.times
    unfolded = conv(step.conv, run, past, x, plain(x))  # [n, H, W, T 2 2 C']
    out = unfolded_channels(unfolded, times)  # [n T, 2 H, 2 W, C'], or twice the channels
    del unfolded
    if out.shape[-1] > step.out_channels:
        out = out[..., : step.out_channels].contiguous()
    shortcut = unfolded_channels(x, times)  # [n T, 2 H, 2 W, c]
    out.view(*out.shape[:3], shortcut.shape[-1], -1).add_(shortcut[..., None])  # every channel is repeated
    return out


def unfolded_channels(x: Tensor, times: int) -> Tensor:  # [n, H, W, T 2 2 C] -> [n T, 2 H, 2 W, C]
    """Unfold channels in the order (s, p, q, c): pixel (2 i + p, 2 j + q) of frame T k + s."""
    n, height, width, channels = x.shape
    parts = x.view(n, height, width, times, 2, 2, channels // (4 * times)).permute(0, 3, 1, 4, 2, 5, 6)
    return parts.reshape(n * times, 2 * height, 2 * width, channels // (4 * times))


def add_duplicates_(x: Tensor, entered: Tensor, shortcut: Duplicate, is_first: bool) -> None:
    """Add the shortcut of a block to its output `[n', 2 H, 2 W, C']`. entered: the block's input `[n, H, W, C]`."""
    times, parts = shortcut.times, 4 * shortcut.times
    skipped = times - 1 if is_first else 0
    for part in range(parts):  # the channels of output frame s, row p and column q
        (s, p), q = divmod(part // 2, 2), part % 2
        if s < skipped:
            continue
        sources = (torch.arange(shortcut.out_channels, device=x.device) * parts + part) // shortcut.repeats  # [C']
        x[s - skipped :: times - skipped, p::2, q::2] += entered[..., sources]


def unpatch(sample: Tensor, patch: int) -> Tensor:  # [n, H, W, C p p] -> [n, p H, p W, C]
    """Unfold the channels of blocks of pixels. Channels are ordered (c, column, row), as diffusers' `unpatchify`."""
    if patch == 1:
        return sample
    n, height, width, channels = sample.shape
    parts = sample.view(n, height, width, channels // patch**2, patch, patch)  # [n, H, W, C, q, p]
    return parts.permute(0, 1, 5, 2, 4, 3).reshape(n, patch * height, patch * width, channels // patch**2)
