"""The decoder of LTX-Video and LTX-2, one step and one chunk of frames at a time. Nothing here is approximate.

A convolution that reads one frame ahead holds back its last frame until the next chunk; after the last chunk, it reads
that chunk's last frame once more and makes the frame that was held back. Shortcuts around such convolutions wait in the
same way. Each step takes chunks of the size that suits it, so that no step computes a frame twice, and the memory does
not depend on the length of the video.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.causal_kernels import TAPS
from .causal_passes import Fill, Past, Run, fill_edges, normalized, plain, through_shortcut, unpatch
from .ltx_layers import Enlarge, FramesConv, FramesDecoder, FramesResnet, Last, Step

Chunks = Iterator[tuple[Tensor, bool]]
"""Chunks `[n, H, W, C]` of a video, from its first frame on, and whether each is the last one. n may be 0."""

MOST_FRAMES = 32  # of a step at a time, however small they are; more are not faster


def decode_frames(decoder: FramesDecoder, run: Run, chunk_bytes: int, latents: Tensor) -> Iterator[Tensor]:
    """Decode a video, or some rows of it: `[F, h, w, C]` -> chunks `[n, H, W, 3]`, which together have all frames.

    chunk_bytes: about how large the largest activation of a step may be.
    """
    past = Past()
    chunks: Chunks = iter([(latents, True)])
    for step in decoder.steps:
        chunks = _through(step, run, past, chunks, chunk_bytes)
    return (sample for sample, _ in chunks if len(sample))


def most_frames(step: Step, pixels: int, itemsize: int, chunk_bytes: int) -> int:
    """Return how many frames of this many pixels a step takes at a time."""
    return min(MOST_FRAMES, max(1, chunk_bytes // (pixels * step.widest * itemsize)))


def _through(step: Step, run: Run, past: Past, chunks: Chunks, chunk_bytes: int) -> Chunks:
    """Run a step on all chunks. No variable here keeps a chunk alive while it is not needed."""
    for x, is_last in chunks:  # [n, H, W, C]
        if not len(x):
            continue
        most = most_frames(step, x.shape[1] * x.shape[2], x.element_size(), chunk_bytes)
        parts = list(torch.tensor_split(x, -(-len(x) // most)))
        del x
        while parts:
            yield _advance(step, run, past, parts.pop(0), is_last and not parts), is_last and not parts


def _advance(step: Step, run: Run, past: Past, x: Tensor, is_last: bool) -> Tensor:  # [n, H, W, C] -> [n', H', W', C']
    """Run a step on the next frames. x may be overwritten."""
    match step:
        case FramesConv():
            return conv(step, run, past, x, plain(x), is_last)
        case FramesResnet():
            return resnet(step, run, past, x, is_last)
        case Enlarge():
            return enlarge(step, run, past, x, is_last)
        case Last():
            sample = conv(step.conv, run, past, x, normalized(step.norm, run, past, x), is_last)
            return unpatch(sample, step.patch)


def conv(
    layer: FramesConv, run: Run, past: Past, x: Tensor, fill: Fill, is_last: bool, total: Tensor | None = None
) -> Tensor:  # [n, H, W, C] -> [n', H, W, C']
    """Run a convolution over the rows that `fill` writes. total: the output is added to it, in place."""
    count = frames_made(layer, past, len(x), is_last)
    out = x.new_empty(count, *x.shape[1:3], layer.out_channels) if total is None else total
    for top, bottom, _, band in conv_bands(layer, run, past, x, fill, is_last):
        if total is None:
            out[:, top:bottom] = band
        else:
            out[:, top:bottom] += band
    return out


def frames_made(layer: FramesConv, past: Past, frames: int, is_last: bool) -> int:
    """Return how many frames a convolution makes of its next `frames` frames."""
    held_back = layer.lag if frames and past.of(layer) is None else 0
    return frames - held_back + (layer.lag if is_last else 0)


def conv_bands(
    layer: FramesConv, run: Run, past: Past, x: Tensor, fill: Fill, is_last: bool
) -> Iterator[tuple[int, int, Tensor, Tensor]]:  # [n, H, W, C]
    """Yield (top, bottom, current, output) for each band of rows [top, bottom).

    output: `[n', r, W, C']`. current: the input of the same frames, `[n', r, W, C]`, which may be before those of x.
    """
    n, height, width, channels = x.shape
    count, before, edge = frames_made(layer, past, n, is_last), past.of(layer), int(bool(layer.edge))
    if not n:
        return
    lead, columns = layer.frames_before if before is None else TAPS - 1, slice(edge, width + edge)
    frames = count + TAPS - 1
    kept = None if is_last else x.new_empty(TAPS - 1, height, width, channels)  # [2, H, W, C]
    for top, bottom in run.bands(frames, height, width * layer.widest, x.element_size()):
        above, below = max(top - 1, 0), min(bottom + 1, height)
        window = x.new_empty(frames, bottom - top + 2, width + 2 * edge, channels)  # [n' + 2, r + 2, W (+ 2), C]
        inner = window[:, above - top + 1 : below - top + 1, columns]  # [n' + 2, r (+ 2), W, C]
        fill(above, below, inner[lead : lead + n])
        inner[:lead] = inner[lead : lead + 1] if before is None else before[:, above:below]
        inner[lead + n :] = inner[lead + n - 1 : lead + n]
        if kept is not None:
            kept[:, top:bottom] = window[-2:, 1:-1, columns]
        fill_edges(window, layer.edge, is_top=top == 0, is_bottom=bottom == height)
        if count:
            current = window[TAPS - 1 - layer.lag :][:count, 1:-1, columns]  # [n', r, W, C]
            yield top, bottom, current, run.kernels.conv(window, layer.weight, layer.bias, 1 - edge)
    if kept is not None:
        past.keep(layer, kept)


def resnet(step: FramesResnet, run: Run, past: Past, x: Tensor, is_last: bool) -> Tensor:  # [n, H, W, C]
    """Run a residual block. x is overwritten."""
    hidden = conv(step.conv1, run, past, x, normalized(step.norm1, run, past, x), is_last)  # [n', H, W, C']
    if step.shortcut is not None:
        x = through_shortcut(step.shortcut, x)  # [n, H, W, C']
    total = delayed(step, past, x, is_last)  # [n'', H, W, C']
    del x
    return conv(step.conv2, run, past, hidden, normalized(step.norm2, run, past, hidden), is_last, total)


def delayed(step: FramesResnet, past: Past, x: Tensor, is_last: bool) -> Tensor:  # [n, H, W, C] -> [n', H, W, C]
    """Return the frames that a step with a lag makes next; x itself if there is no lag."""
    if not step.lag:
        return x
    before = past.of(step)
    waiting = x if before is None else torch.cat([before, x])  # [up to n + 2, H, W, C]
    count = len(waiting) if is_last else max(0, len(waiting) - step.lag)
    if not is_last:
        past.keep(step, waiting[count:].clone())
    return waiting[:count]


def enlarge(step: Enlarge, run: Run, past: Past, x: Tensor, is_last: bool) -> Tensor:
    """Unfold channels to frames, rows and columns: `[n, H, W, C]` -> `[n', P H, P W, C']`, P being `step.size`.

    n' is T times the frames that the convolution makes, without the first T - 1 of the video.
    """
    n, height, width, _ = x.shape
    times, size, channels = step.times, step.size, step.out_channels
    count = frames_made(step.conv, past, n, is_last)
    skipped = times - 1 if past.of(step) is None else 0
    if count:
        past.keep(step, x.new_empty(0))  # the first frame is made
    out = x.new_empty(count, times, height, size, width, size, channels)  # [n', T, H, P, W, P, C']
    for top, bottom, current, band in conv_bands(step.conv, run, past, x, plain(x), is_last):
        if step.repeats:
            parts, pixels = times * size**2, current.shape[:3]
            added = current.view(*pixels, -1, 1, parts).transpose(-3, -1)  # [n', r, W, T P P, 1, c]
            band.view(*pixels, parts, step.repeats, -1).add_(added)
        unfolded = band.view(count, bottom - top, width, times, size, size, channels)  # [n', r, W, T, P, P, C']
        out[:, :, top:bottom] = unfolded.permute(0, 3, 1, 4, 2, 5, 6)
    return out.view(count * times, size * height, size * width, channels)[skipped:]
