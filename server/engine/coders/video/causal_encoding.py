"""The layers that only causal encoders have, on one chunk of frames. Nothing here is approximate.

The convolutions, residual blocks and other attentions are in `causal_passes.py`. The first frame of a video is not
halved in time. It is a chunk of its own, except for layers that average frames, which also take it together with later
frames. Not counting it, every chunk has a multiple of the frames that become one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.causal_kernels import TAPS
from ..image.layers import Linear
from .causal_encoder_layers import (
    Average,
    Beside,
    CausalDownsample,
    Contract,
    Downsample,
    EncoderBlock,
    Fold,
    FrameAttention,
)
from .causal_layers import Attention, Resnet, SpanNorm
from .causal_passes import Run, VideoPast, attention, conv, grouped_mean, plain, resnet

MOST_POSITIONS = 1 << 15  # attended to at once: CUDA's kernels take no more than 65535


def encoder_block(block: EncoderBlock, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C]
    """Run the layers of a block, and add its shortcut: `[n', h, w, C']`. x is overwritten."""
    shortcut = None if block.shortcut is None else averaged(block.shortcut, run, x)  # [n', h, w, C']
    for step in block.steps:
        match step:
            case Resnet():
                x = resnet(step, run, past, x)
            case Attention():
                x = attention(step, run, past, x)
            case Downsample():
                x = downsample(step, run, past, x)
            case CausalDownsample():
                x = causal_downsample(step, run, past, x)
            case Fold():
                x = fold(step, run, past, x)
            case Contract():
                x = contract(step, run, past, x)
            case FrameAttention():
                x = frame_attention(step, run, past, x)
    return x if shortcut is None else x.add_(shortcut)


def downsample(step: Downsample, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', H/2, W/2, C']
    """Halve rows and columns, and frames if the layer has `time` or `averages_frames`.

    The first frame of a video stays a single frame.
    """
    _, height, width, channels = x.shape
    single = int(past.place.is_single)
    n = single + (len(x) - single) // 2 if step.averages_frames else len(x)
    out = x.new_empty(n, height // 2, width // 2, step.out_channels)
    for top, bottom in run.bands(n, height // 2, 2 * width * channels, x.element_size()):
        window = x.new_empty(n, 2 * (bottom - top) + 1, width + 1, channels)  # [n, 2 r + 1, W + 1, C]
        below = min(2 * bottom + 1, height)
        rows = window[:, : below - 2 * top, :-1]
        if step.averages_frames:
            average_frames(x[:, 2 * top : below], rows, single)
        else:
            rows.copy_(x[:, 2 * top : below])
        zero_ends(window, below - 2 * top)
        out[:, top:bottom] = run.kernels.planar.conv(window, step.space, step.bias, columns=0, stride=2)
    return out if step.time is None else halve_frames(step.time, past, out)


def average_frames(x: Tensor, out: Tensor, single: int) -> None:  # [n, r, W, C], [n', r, W, C]
    """Write the mean of each pair of frames to `out`. single: how many frames at the start, 0 or 1, are copied."""
    out[:single] = x[:single]
    torch.add(x[single::2], x[single + 1 :: 2], out=out[single:]).mul_(0.5)


def zero_ends(window: Tensor, rows: int) -> None:  # [n, 2 r + 1, W + 1, C]
    """Write zeros below so many rows of a window, and to the right of all."""
    window[:, rows:] = 0
    window[:, :, -1] = 0


def halve_frames(time: Linear, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n / 2, H, W, C]
    """Compute one frame from each pair of frames and the frame before it. A video's first frame stays as it is."""
    before = past.of(time)  # [1, H, W, C]
    if not past.is_last:
        past.keep(time, x[-1:].clone())
    if past.place.is_single:
        return x
    assert before is not None
    n, height, width, channels = x.shape
    triples = x.new_empty(n // 2, height, width, TAPS, channels)  # [n / 2, H, W, 3, C]
    triples[0, :, :, 0] = before[0]
    triples[1:, :, :, 0] = x[1:-1:2]
    triples[:, :, :, 1] = x[::2]
    triples[:, :, :, 2] = x[1::2]
    return F.linear(triples.flatten(3), time.weight, time.bias)


def causal_downsample(
    step: CausalDownsample, run: Run, past: VideoPast, x: Tensor
) -> Tensor:  # [n, H, W, C] -> [n / T, H / 2, W / 2, C']
    """Run a causal convolution of stride 2, and of stride T = `times` in time."""
    n, height, width, channels = x.shape
    before = past.of(step)  # [3 - T, H, W, C]
    if before is None:
        before = x.expand(TAPS - 1, -1, -1, -1)  # the first frame of a video comes as a chunk of its own
    frames = 1 + (len(before) + n - TAPS) // step.times
    out = x.new_empty(frames, height // 2, width // 2, step.out_channels)
    for top, bottom in run.bands(len(before) + n, height // 2, 2 * width * channels, x.element_size()):
        window = downsampling_window(before, x, top, bottom, step.beside)
        ends = [len(window) - TAPS + 1 + tap for tap in range(TAPS)]
        taps = torch.cat([window[tap : end : step.times] for tap, end in enumerate(ends)], -1)  # [n / T, ..., 3 C]
        out[:, top:bottom] = run.kernels.planar.conv(taps, step.weight, step.bias, columns=0, stride=2)
    kept = TAPS - step.times
    if not past.is_last:
        past.keep(step, x[-kept:].clone() if n >= kept else torch.cat([before[n - kept :], x]))
    return out


def downsampling_window(
    before: Tensor, x: Tensor, top: int, bottom: int, beside: Beside
) -> Tensor:  # [k, H, W, C], [n, H, W, C] -> [k + n, 2 (bottom - top) + 1, W + 1, C]
    """Return the rows of all frames that output rows [top, bottom) read, and what lies beside the frames."""
    k, (_, height, width, channels) = len(before), x.shape
    window = x.new_empty(k + len(x), 2 * (bottom - top) + 1, width + 1, channels)
    if beside is Beside.ZEROS_AFTER:
        above, below = 2 * top, min(2 * bottom + 1, height)
        rows = window[:, : below - above, :-1]
    else:
        above, below = max(2 * top - 1, 0), 2 * bottom
        rows = window[:, int(top == 0) :, 1:]
    rows[:k], rows[k:] = before[:, above:below], x[:, above:below]
    if beside is Beside.ZEROS_AFTER:
        zero_ends(window, below - above)
        return window
    repeats = beside is Beside.EDGES_BEFORE
    if top == 0:
        window[:, 0] = window[:, 1] if repeats else 0
    window[:, :, 0] = window[:, :, 1] if repeats else 0
    return window


def fold(step: Fold, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n / T, H / S, W / S, C']
    """Fold the rows, the columns and, except for the first frame of a video, the frames."""
    times, side = 1 if past.place.is_single else step.times, step.side
    made = conv(step.conv, run, past, x, plain(x))  # [n, H, W, c]
    if times < step.times:
        made = made.expand(step.times, -1, -1, -1)  # the first frame, and a copy of it
    out = folded_channels(made, step.times, side, channel_first=step.channel_first)  # [n / T, H / S, W / S, C']
    del made
    _, height, width, channels = x.shape
    for index, part in enumerate(torch.split(x, times)):  # [T, H, W, C], or the first frame
        frames = part.expand(step.times, -1, -1, -1) if step.channel_first else part
        for top, bottom in run.bands(step.times, height // side, side * width * channels, x.element_size()):
            rows = frames[:, side * top : side * bottom]  # [T, S r, W, C]
            shortcut = folded_channels(rows, len(rows), side, channel_first=step.channel_first)[0]
            out[index, top:bottom] += grouped_mean(shortcut, step.out_channels)
    return out


def folded_channels(
    x: Tensor, times: int, side: int, *, channel_first: bool
) -> Tensor:  # [n T, S H, S W, C] -> [n, H, W, T S S C]
    """Fold frames and blocks of SxS pixels into channels in the order (s, p, q, c), or (c, s, p, q).

    The first order undoes `unfolded_channels`.
    """
    n, height, width, channels = x.shape
    parts = x.view(n // times, times, height // side, side, width // side, side, channels)
    order = (0, 2, 4, 6, 1, 3, 5) if channel_first else (0, 2, 4, 1, 3, 5, 6)
    return parts.permute(order).reshape(n // times, height // side, width // side, times * side**2 * channels)


def contract(step: Contract, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n T, 2 H, 2 W, C] -> [n, H, W, C']
    """Run a linear map of blocks of pixels."""
    if past.place.is_single:
        x = x.expand(step.times, -1, -1, -1)  # the first frame, and copies of it
    frames, height, width, channels = x.shape
    out = x.new_empty(frames // step.times, height // 2, width // 2, step.out_channels)
    for top, bottom in run.bands(frames, height // 2, 2 * width * channels, x.element_size()):
        blocks = folded_channels(x[:, 2 * top : 2 * bottom], step.times, 2, channel_first=False)
        out[:, top:bottom] = F.linear(blocks, step.linear.weight, step.linear.bias)
    return out


def frame_attention(step: FrameAttention, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C]
    """Attend to the frames so far at each position. x is overwritten."""
    n, height, width, channels = x.shape
    assert isinstance(step.norm, SpanNorm)
    affines = past.statistics.affines(step.norm, past.place, x)
    keys, values = past.all_of(step.key, torch.empty_like(x)), past.all_of(step.value, torch.empty_like(x))
    frames = sum(map(len, keys))  # so far
    mask = None if n == 1 else torch.ones(n, frames, dtype=torch.bool, device=x.device).tril_(frames - n)  # [n, F]
    # Twice the keys and queries: they are copied to their order by position.
    for start, stop in run.bands(2 * (frames + n), height, width * channels, x.element_size()):
        rows = max(1, MOST_POSITIONS // width)
        for top in range(start, stop, rows):
            bottom = min(top + rows, stop)
            tokens = x.new_empty(n, bottom - top, width, channels)  # [n, r, W, C]
            for frame, affine in enumerate(affines):
                run.kernels.planar.normalize(x[frame, top:bottom][None], affine, tokens[frame][None], silu=False)
            key = F.linear(tokens, step.key.weight, step.key.bias)  # [n, r, W, C]
            keys[-1][:, top:bottom] = normalized_heads(step, key)
            values[-1][:, top:bottom] = F.linear(tokens, step.value.weight, step.value.bias)
            query = normalized_heads(step, F.linear(tokens, step.query.weight, step.query.bias))  # [n, r, W, C]
            attended = F.scaled_dot_product_attention(
                by_position(step, [query]),
                by_position(step, [part[:, top:bottom] for part in keys]),
                by_position(step, [part[:, top:bottom] for part in values]),
                attn_mask=mask,
            )  # [r W, heads, n, D]
            mixed = attended.permute(2, 0, 1, 3).reshape(tokens.shape)  # [n, r, W, C]
            x[:, top:bottom] += F.linear(mixed, step.out.weight, step.out.bias)
    return x


def normalized_heads(step: FrameAttention, x: Tensor) -> Tensor:  # [n, r, W, C]
    """Divide the channels of each head by their length."""
    return F.normalize(x.view(*x.shape[:3], step.heads, -1), dim=-1, eps=step.eps).flatten(3)


def by_position(step: FrameAttention, parts: list[Tensor]) -> Tensor:  # [n, r, W, C] each -> [r W, heads, F, D]
    """Return the frames of all parts in order, by position and head."""
    frames = parts[0] if len(parts) == 1 else torch.cat(parts)  # [F, r, W, C]
    n, rows, width, _ = frames.shape
    return frames.view(n, rows, width, step.heads, -1).flatten(1, 2).permute(1, 2, 0, 3)


def averaged(shortcut: Average, run: Run, x: Tensor) -> Tensor:  # [n T, S H, S W, C] -> [n, H, W, C']
    """Return the shortcut around a block for the block's input."""
    times, side = shortcut.times, shortcut.side
    _, height, width, channels = x.shape
    out = x.new_empty(-(-len(x) // times), height // side, width // side, shortcut.out_channels)
    for index, frames in enumerate(torch.split(x, times)):  # [T, S H, S W, C]
        for top, bottom in run.bands(times, height // side, side * width * channels, x.element_size()):
            rows = frames[:, side * top : side * bottom]  # [T, S r, S W, C]
            missing = times - len(rows)  # before the first frame of a video
            rows = torch.cat([rows.new_zeros(missing, *rows.shape[1:]), rows]) if missing else rows
            parts = rows.reshape(times, bottom - top, side, width // side, side, channels)
            parts = parts.permute(1, 3, 5, 0, 2, 4).flatten(2)  # [r, W, C T S S]
            out[index, top:bottom] = grouped_mean(parts, shortcut.out_channels)
    return out
