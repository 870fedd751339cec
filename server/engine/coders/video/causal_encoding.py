"""A causal encoder, layer by layer, on one chunk of frames. Nothing here is approximate.

The convolutions, residual blocks and attentions are those of the decoder, in `causal_passes.py`. The layers that halve
the size are here. The first frame of a video is a chunk of its own: no layer halves it in time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.causal_kernels import TAPS
from ..image.layers import Linear
from .causal_encoder_layers import Average, CausalEncoder, Downsample, EncoderBlock, Fold
from .causal_layers import Attention, Resnet
from .causal_passes import Past, Run, attention, conv, normalized, plain, resnet


def encode_front(encoder: CausalEncoder, run: Run, past: Past, x: Tensor) -> Tensor:
    """Run the layers that look no further than a few rows on the next frames: `[n, H, W, C]` -> `[n', h, w, C']`.

    x: the pixels, or some rows of them, as `patches` returns them. The first call must have the first frame only.
    """
    # Bands are measured by a layer's input, which is much smaller here than its output.
    smaller = replace(run, band_bytes=max(1, run.band_bytes * encoder.in_channels // encoder.conv_in.out_channels))
    x = conv(encoder.conv_in, smaller, past, x, plain(x))  # [n, H, W, C]
    for block in encoder.front:
        x = advance(block, run, past, x)
    return x


def encode_back(encoder: CausalEncoder, run: Run, past: Past, x: Tensor) -> Tensor:
    """Run the other layers on whole frames of the output of `encode_front`: `[n, h, w, C]` -> `[n, h, w, 2 C']`.

    x is overwritten.
    """
    for block in encoder.back:
        x = advance(block, run, past, x)
    parameters = conv(encoder.conv_out, run, past, x, normalized(encoder.norm_out, run, x))  # [n, h, w, 2 C']
    if encoder.averages_output:
        parameters += grouped_mean(x, parameters.shape[-1])
    if encoder.quant is None:
        return parameters
    return F.linear(parameters, encoder.quant.weight, encoder.quant.bias)


def advance(block: EncoderBlock, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', h, w, C']
    """Run the layers of a block, and add its shortcut. x is overwritten."""
    shortcut = None if block.shortcut is None else averaged(block.shortcut, run, x)  # [n', h, w, C']
    for step in block.steps:
        match step:
            case Resnet():
                x = resnet(step, run, past, x)
            case Attention():
                x = attention(step, run, past, x)
            case Downsample():
                x = downsample(step, run, past, x)
            case Fold():
                x = fold(step, run, past, x)
    return x if shortcut is None else x.add_(shortcut)


def downsample(step: Downsample, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', H / 2, W / 2, C]
    """Halve the rows, the columns and the frames."""
    n, height, width, channels = x.shape
    out = x.new_empty(n, height // 2, width // 2, step.out_channels)
    for top, bottom in run.bands(n, height // 2, 2 * width * channels, x.element_size()):
        window = x.new_empty(n, 2 * (bottom - top) + 1, width + 1, channels)  # [n, 2 r + 1, W + 1, C]
        below = min(2 * bottom + 1, height)
        window[:, : below - 2 * top, :-1] = x[:, 2 * top : below]
        window[:, below - 2 * top :] = 0
        window[:, :, -1] = 0
        out[:, top:bottom] = run.kernels.kernels.conv(window, step.space, step.bias, columns=0, stride=2)
    return out if step.time is None else halve_frames(step.time, past, out)


def halve_frames(time: Linear, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n / 2, H, W, C]
    """Compute one frame from each pair of frames and the frame before it. The first frame of a video stays as it is."""
    before = past.of(time)  # [1, H, W, C]
    past.keep(time, x[-1:].clone())
    if before is None:
        return x
    window = torch.cat([before, x])  # [n + 1, H, W, C]
    triples = torch.cat([window[tap : tap + len(x) - 1 : 2] for tap in range(TAPS)], -1)  # [n / 2, H, W, 3 C]
    return F.linear(triples, time.weight, time.bias)


def fold(step: Fold, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', H / 2, W / 2, C']
    """Halve the rows, the columns and, except for the first frame of a video, the frames."""
    times = 1 if past.of(step.conv) is None else step.times
    out = folded_channels(conv(step.conv, run, past, x, plain(x)), times)  # [n', H / 2, W / 2, C' or C' / 2]
    if times < step.times:
        out = torch.cat([out] * step.times, -1)  # [1, H / 2, W / 2, C']
    for index, frames in enumerate(torch.split(x, times)):  # [T, H, W, C]
        run.check()
        shortcut = folded_channels(frames, times)[0]  # [H / 2, W / 2, T 2 2 C]
        out[index] += grouped_mean(shortcut, step.out_channels)
    return out


def folded_channels(x: Tensor, times: int) -> Tensor:  # [n T, 2 H, 2 W, C] -> [n, H, W, T 2 2 C]
    """Fold frames and blocks of 2x2 pixels into channels in the order (s, p, q, c): undo `unfolded_channels`."""
    n, height, width, channels = x.shape
    parts = x.view(n // times, times, height // 2, 2, width // 2, 2, channels).permute(0, 2, 4, 1, 3, 5, 6)
    return parts.reshape(n // times, height // 2, width // 2, times * 4 * channels)


def averaged(shortcut: Average, run: Run, x: Tensor) -> Tensor:  # [n T, S H, S W, C] -> [n, H, W, C']
    """Return the shortcut around a block for the block's input."""
    times, side = shortcut.times, shortcut.side
    _, height, width, channels = x.shape
    h, w = height // side, width // side
    out = x.new_empty(-(-len(x) // times), h, w, shortcut.out_channels)
    for index, frames in enumerate(torch.split(x, times)):  # [T, S H, S W, C]
        run.check()
        missing = times - len(frames)  # before the first frame of a video
        frames = torch.cat([frames.new_zeros(missing, height, width, channels), frames]) if missing else frames
        parts = frames.view(times, h, side, w, side, channels).permute(1, 3, 5, 0, 2, 4)  # [H, W, C, T, S, S]
        out[index] = grouped_mean(parts.reshape(h, w, -1), shortcut.out_channels)
    return out


def grouped_mean(x: Tensor, groups: int) -> Tensor:  # [..., C] -> [..., groups]
    """Return the mean of each group of neighbouring channels."""
    return x.reshape(*x.shape[:-1], groups, -1).mean(-1)


def patches(pixels: Tensor, patch: int) -> Tensor:  # [n, p H, p W, C] -> [n, H, W, C p p]
    """Fold blocks of pixels into channels in the order (c, column, row): undo `unpatch`."""
    if patch == 1:
        return pixels
    n, height, width, channels = pixels.shape
    parts = pixels.view(n, height // patch, patch, width // patch, patch, channels)  # [n, H, p, W, q, C]
    return parts.permute(0, 1, 3, 5, 4, 2).reshape(n, height // patch, width // patch, channels * patch**2)
