"""The layers of causal coders on one chunk of frames: those of both directions, and those of decoders only.

Nothing here is approximate. `causal_encoding.py` has the layers of encoders only.

Every layer works on bands of rows that stay in the processor's caches. A 3x3 convolution needs one row of its input
above and one below a band; these rows are normalized again for the neighbouring band. A causal convolution also needs
the two frames before the chunk, normalized: `Past` keeps them. Rows around the image are written into the window of the
band at the edge. Columns of zeros around it are the convolution's own padding.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.causal_kernels import TAPS, CausalKernels
from ...kernels.reference import SCORE_BYTES
from ..image.layers import Linear
from ..interface import Check
from .causal_layers import (
    Attention,
    Before,
    Block,
    CausalConv,
    CausalUpsample,
    Doubling,
    Duplicate,
    Expand,
    Norm,
    NormedLinear,
    PixelNorm,
    PixelRms,
    Resnet,
    SpanNorm,
    Unfold,
    Upsample,
)
from .causal_stages import Begin, End, State
from .causal_statistics import Place, Statistics


class Edge(enum.IntEnum):
    """What lies around an image: zeros, its first and last rows and columns, or those next to them, as in a mirror.

    The value is also how far from the edge of a window the row or column is that is copied to the edge.
    """

    ZERO = 0
    REPEATED = 1
    REFLECTED = 2


Fill = Callable[[int, int, Tensor], None]
"""Writes rows [top, bottom) of a layer's input, for all frames of the chunk, into a tensor `[n, rows, W, C]`."""


@dataclass
class Past:
    """What each layer keeps from earlier chunks, by the layer's identity.

    kept: what each layer chooses: usually the last frames of its input `[k, H, W, C]`; attention over all frames so far
        keeps its keys or values `[1, N, C]`.
    seen: what layers made of every chunk, a tensor for each.
    is_last: this is the last chunk; `keep` then drops what it is given.
    """

    is_last: bool = field(default=False, kw_only=True)
    kept: dict[int, Tensor] = field(default_factory=dict, kw_only=True)
    seen: dict[int, list[Tensor]] = field(default_factory=dict, kw_only=True)  # by layer, [n, H, W, C] each

    def of(self, layer: object) -> Tensor | None:
        """Return what a layer kept; None before its first chunk."""
        return self.kept.get(id(layer))

    def taken(self, layer: object) -> Tensor | None:
        """Return what a layer kept, and keep it no longer."""
        return self.kept.pop(id(layer), None)

    def keep(self, layer: object, kept: Tensor) -> None:
        """Keep a tensor until the layer's next chunk. It must not share memory with one that will be overwritten."""
        if not self.is_last:
            self.kept[id(layer)] = kept

    def all_of(self, layer: object, latest: Tensor) -> list[Tensor]:  # [n, H, W, C]
        """Remember what a layer made of a chunk, and return that of all chunks so far."""
        chunks = self.seen.setdefault(id(layer), [])
        chunks.append(latest)
        return chunks


@dataclass
class VideoPast(Past):
    """What is known of a video while its chunks are computed one after another.

    statistics: those of its norms. place: where the present chunk is.
    """

    statistics: Statistics
    place: Place


@dataclass(frozen=True)
class Run:
    """One decode or encode.

    band_bytes: the wanted bytes of the widest activation of a band. query_bytes: the most bytes of attention scores at
    a time; 0 if there is no attention. check: called before each band; raises Stopped if nobody waits for the result.
    """

    kernels: CausalKernels
    band_bytes: int
    query_bytes: int
    check: Check

    def bands(self, frames: int, height: int, row_values: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Yield bands [top, bottom) of an image of `height` rows.

        frames: those of a band. row_values: the values of one row of one frame at the layer's widest. itemsize: the
        bytes of a value.
        """
        rows = max(1, self.band_bytes // (frames * row_values * itemsize))
        for top in range(0, height, rows):
            self.check()
            yield top, min(top + rows, height)


def begin(stage: Begin, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, p H, p W, Z] -> [n, H, W, C]
    """Run the first layer on latents or pixels."""
    x = patches(x, stage.patch)  # [n, H, W, Z p p]
    if isinstance(stage.conv, Linear):
        return begin_linear(stage.conv, stage.waves, run, x)
    y = conv(stage.conv, run, past, x, plain(x))
    if stage.repeats_input:
        y += x.repeat_interleave(stage.repeats_input, -1)
    return y


def begin_linear(
    layer: Linear, waves: Tensor | None, run: Run, x: Tensor
) -> Tensor:  # [K], [n, H, W, C] -> [n, H, W, C']
    """Run a linear layer on latents, or on pixels and their sines and cosines."""
    if waves is None:
        return F.linear(x, layer.weight, layer.bias)
    out = x.new_empty(*x.shape[:3], len(layer.weight))
    for top, bottom in run.bands(len(x), x.shape[1], x.shape[2] * out.shape[3], x.element_size()):
        pixels = x[:, top:bottom].float()  # [n, r, W, C]
        angles = (pixels[..., None] * waves).flatten(3)  # [n, r, W, C K]
        features = torch.cat([pixels, angles.sin(), angles.cos()], -1)  # [n, r, W, C + 2 C K]
        out[:, top:bottom] = F.linear(features.to(x.dtype), layer.weight, layer.bias)
    return out


def resnet(block: Resnet, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n, H, W, C']
    """Run a residual block. x is overwritten."""
    x, hidden = enter_resnet(block, run, past, x)
    assert hidden is not None
    return leave_resnet(block, run, past, x, hidden)


def enter_resnet(block: Resnet, run: Run, past: Past, x: Tensor) -> State:  # [n, H, W, C]
    """Run the first half of a residual block."""
    hidden = conv(block.conv1, run, past, x, normalized(block.norm1, run, past, x))  # [n, H, W, C']
    return State(x if block.shortcut is None else through_shortcut(block.shortcut, x), hidden)


def through_shortcut(shortcut: Linear | NormedLinear, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n, H, W, C']
    """Mix the channels of each pixel, which are normalized first if the shortcut says so."""
    if isinstance(shortcut, NormedLinear):
        x = F.layer_norm(x, x.shape[-1:], shortcut.weight, shortcut.bias, shortcut.eps)  # [n, H, W, C]
        shortcut = shortcut.linear
    return F.linear(x, shortcut.weight, shortcut.bias)


def leave_resnet(
    block: Resnet, run: Run, past: Past, x: Tensor, hidden: Tensor
) -> Tensor:  # [n, H, W, C'] twice -> [n, H, W, C']
    """Run the second half of a residual block. x is overwritten."""
    return conv(block.conv2, run, past, hidden, normalized(block.norm2, run, past, hidden), total=x)


def whole_block(block: Block, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C]
    """Run the layers of a decoder's block, and add its shortcut: `[n', S H, S W, C']`. x is overwritten."""
    entered = x.clone() if block.shortcut is not None else None  # resnets add to x in place
    for step in block.steps:
        match step:
            case Resnet():
                x = resnet(step, run, past, x)
            case Attention():
                x = attention(step, run, past, x)
            case Upsample():
                x = upsample(step, run, past, x)
            case CausalUpsample():
                x = causal_upsample(step, run, past, x)
            case Unfold():
                x = unfold(step, run, past, x)
            case Expand():
                x = unfolded_channels(F.linear(x, step.linear.weight, step.linear.bias), step.times)
    if block.shortcut is not None and entered is not None:
        add_duplicates_(x, entered, block.shortcut, past.place.is_single)
    return x


def end(stage: End, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n, p H, p W, C']
    """Run the last norm and the last layer."""
    if isinstance(stage.conv, Linear):
        y = F.silu(x) if stage.norm is None else torch.empty_like(x)  # [n, H, W, C]
        if stage.norm is not None:
            normalized(stage.norm, run, past, x)(0, x.shape[1], y)
        out = F.linear(y, stage.conv.weight, stage.conv.bias)
    else:
        assert stage.norm is not None
        out = conv(stage.conv, run, past, x, normalized(stage.norm, run, past, x))
    if stage.averages:
        out += grouped_mean(x, out.shape[-1])
    if stage.quant is not None:
        out = F.linear(out, stage.quant.weight, stage.quant.bias)
    if stage.repeats_last:
        out = torch.cat([out, out[..., -1:].expand(-1, -1, -1, stage.repeats_last)], -1)
    out = unpatch(out, stage.patch)
    return out.clamp_(-1, 1) if stage.clamps else out


def plain(x: Tensor) -> Fill:
    """Return how x itself is written for a band."""

    def fill(top: int, bottom: int, out: Tensor) -> None:
        out.copy_(x[:, top:bottom])

    return fill


def normalized(norm: Norm, run: Run, past: Past, x: Tensor) -> Fill:
    """Return how silu(norm(x)) is written for a band."""
    if isinstance(norm, PixelNorm):

        def fill(top: int, bottom: int, out: Tensor) -> None:
            run.kernels.norm_silu(x[:, top:bottom], norm.weight, out)

        return fill
    if isinstance(norm, PixelRms):

        def fill_rms(top: int, bottom: int, out: Tensor) -> None:
            run.kernels.rms_norm_silu(x[:, top:bottom], norm.eps, norm.scale, norm.shift, out)

        return fill_rms
    assert isinstance(past, VideoPast)
    affines = past.statistics.affines(norm, past.place, x)
    gain = None if norm.scale is None or norm.shift is None else Gain.of(norm.scale, norm.shift, past.place, x)

    def fill_frames(top: int, bottom: int, out: Tensor) -> None:
        for frame, affine in enumerate(affines):
            rows = x[frame, top:bottom]  # [r, W, C]
            if gain is None:
                run.kernels.affine_silu(rows, affine, out[frame])
            else:
                scale, shift = gain.rows(frame, top, bottom)
                run.kernels.scaled_silu(rows, affine, scale, shift, out[frame])

    return fill_frames


@dataclass(frozen=True)
class Gain:
    """The factors and summands that a chunk's latents give to a norm, at the size of the latents."""

    scale: Tensor  # [F, h, w, C]
    shift: Tensor  # [F, h, w, C]
    frames: list[int]  # the latent frame of each frame
    ratio: int  # rows and columns of the activation per latent

    @classmethod
    def of(cls, scale: Linear, shift: Linear, place: Place, x: Tensor) -> Gain:  # [n, H, W, C]
        """Compute them for the input of a norm."""
        latents, n = place.latents, len(x)  # [F, h, w, Z]
        assert latents is not None
        single = int(place.is_single)
        times = (n - single) // max(1, len(latents) - single)
        frames = [0] * single + [single + frame // times for frame in range(n - single)]
        ratio = x.shape[1] // latents.shape[1]
        return cls(
            F.linear(latents, scale.weight, scale.bias), F.linear(latents, shift.weight, shift.bias), frames, ratio
        )

    def rows(self, frame: int, top: int, bottom: int) -> tuple[Tensor, Tensor]:  # [r, w, C] twice
        """Return both for rows [top, bottom) of a frame, at the latents' width."""
        latent_frame, first, after = self.frames[frame], top // self.ratio, -(-bottom // self.ratio)
        rows = slice(top - first * self.ratio, bottom - first * self.ratio)
        scale, shift = (
            of[latent_frame, first:after].repeat_interleave(self.ratio, 0, output_size=self.ratio * (after - first))[
                rows
            ]
            for of in (self.scale, self.shift)
        )
        return scale, shift


def conv(
    layer: CausalConv, run: Run, past: Past, x: Tensor, fill: Fill, total: Tensor | None = None
) -> Tensor:  # [n, H, W, C] -> [n, H, W, C']
    """Run a causal convolution over the rows that `fill` writes. total: the output is added to it, in place."""
    n, height, width = x.shape[:3]
    out = x.new_empty(n, height, width, layer.out_channels) if total is None else total
    for top, bottom, window, is_first in windows(layer, run, past, x, fill):
        columns = 0 if layer.replicates else 1
        band = (
            run.kernels.conv_first(window, layer.first, layer.bias, columns, layer.first_terms)
            if is_first
            else run.kernels.conv(window, layer.weight, layer.bias, columns)
        )  # [n, r, W, C']
        if total is None:
            out[:, top:bottom] = band
        else:
            out[:, top:bottom] += band
    return out


def windows(
    layer: CausalConv | CausalUpsample, run: Run, past: Past, x: Tensor, fill: Fill
) -> Iterator[tuple[int, int, Tensor, bool]]:  # [n, H, W, C]
    """Yield (top, bottom, window, is_first_frame) for each band [top, bottom) of a causal layer's input.

    The window `[n + k - 1, r + 2, W, C]` is all that the convolution reads for the band: also a row above and below,
    the k - 1 frames before the chunk and, if the layer repeats edges, a column left and right. is_first_frame: the
    window `[1, r + 2, W, C]` is the first frame of a video, without frames before it. Afterwards `past` has the last
    frames of the input.
    """
    n, height, width, channels = x.shape
    before, edge, history = past.of(layer), int(layer.replicates), history_of(layer)
    is_first = before is None and n == 1
    frames = n if is_first else n + history
    repeats = not isinstance(layer, CausalConv) or layer.before is Before.FIRST_FRAME
    columns = slice(edge, width + edge)
    kept = None if past.is_last else x.new_empty(history, height, width, channels)  # [k - 1, H, W, C]
    for top, bottom in run.bands(frames, height, width * widest(layer, channels), x.element_size()):
        above, below = max(top - 1, 0), min(bottom + 1, height)
        window = x.new_empty(frames, bottom - top + 2, width + 2 * edge, channels)  # [n + k - 1, r + 2, W (+ 2), C]
        rows = slice(above - top + 1, below - top + 1)
        fill(above, below, window[frames - n :, rows, columns])
        if before is not None:
            window[:history, rows, columns] = before[:, above:below]
        elif not is_first:
            window[:history, rows, columns] = window[history, rows, columns] if repeats else 0
        if kept is not None:
            kept[:, top:bottom] = _last(window[:, 1:-1, columns], history, repeats)
        fill_edges(
            window, Edge.REPEATED if layer.replicates else Edge.ZERO, is_top=top == 0, is_bottom=bottom == height
        )
        yield top, bottom, window, is_first
    if kept is not None:
        past.keep(layer, kept)


def widest(layer: CausalConv | CausalUpsample, channels: int) -> int:
    """Return the most values that a layer holds for each pixel and frame, either as its input or as its phases."""
    phases = 1 if isinstance(layer, CausalConv) else 4 * layer.times
    return max(channels, phases * layer.out_channels)


def history_of(layer: CausalConv | CausalUpsample) -> int:
    """Return how many frames before a frame the layer reads."""
    return (TAPS if isinstance(layer, CausalConv) else layer.taps) - 1


def _last(window: Tensor, history: int, repeats: bool) -> Tensor:
    """Return the last frames. Those before the first one of a video repeat it, or are zero."""
    if len(window) > history:
        return window[len(window) - history :]
    before = window[:1] if repeats else torch.zeros_like(window[:1])
    return torch.cat([before] * (history - len(window)) + [window])


def fill_edges(window: Tensor, edge: Edge, *, is_top: bool, is_bottom: bool) -> None:  # [n, r + 2, W (+ 2), C]
    """Write the rows and columns around the image into a window; columns of zeros are the convolution's own."""
    if edge:
        window[:, :, 0], window[:, :, -1] = window[:, :, edge], window[:, :, -1 - edge]
    if is_top:
        window[:, 0] = window[:, edge] if edge else 0
    if is_bottom:
        window[:, -1] = window[:, -1 - edge] if edge else 0


def attention(block: Attention, run: Run, past: Past, x: Tensor) -> Tensor:  # [n, h, w, C]
    """Attend within each frame, or to all frames so far. x is overwritten."""
    tokens_of = token_norm(block.norm, run, past, x)
    keys, values = past.taken(block.key), past.taken(block.value)  # [1, N, C] each, those of the chunks before
    for index, frame in enumerate(x.flatten(1, 2)):  # [h w, C]
        tokens = tokens_of(index)  # [1, h w, C]
        key = F.linear(tokens, block.key.weight, block.key.bias)  # [1, h w, C]
        value = F.linear(tokens, block.value.weight, block.value.bias)  # [1, h w, C]
        if block.sees_past:
            key = keys = key if keys is None else torch.cat([keys, key], 1)  # [1, F h w, C]
            value = values = value if values is None else torch.cat([values, value], 1)  # [1, F h w, C]
        rows = max(1, run.query_bytes // (key.shape[1] * SCORE_BYTES))
        for start in range(0, len(frame), rows):
            run.check()
            query = F.linear(tokens[:, start : start + rows], block.query.weight, block.query.bias)  # [1, t, C]
            frame[start : start + rows] += run.kernels.planar.attend(query, key, value)[0].add_(block.bias)
    if keys is not None and values is not None:
        past.keep(block.key, keys)
        past.keep(block.value, values)
    return x


def token_norm(norm: Norm, run: Run, past: Past, x: Tensor) -> Callable[[int], Tensor]:  # [n, h, w, C]
    """Return how a frame of x is normalized to tokens `[1, h w, C]`."""
    if isinstance(norm, PixelNorm):
        weight = norm.weight
        return lambda frame: run.kernels.norm(x[frame].flatten(0, 1)[None, None], weight)[0]
    assert isinstance(norm, SpanNorm)
    assert isinstance(past, VideoPast)
    affines = past.statistics.affines(norm, past.place, x)

    def tokens(frame: int) -> Tensor:
        out = torch.empty_like(x[frame])  # [h, w, C]
        run.kernels.planar.normalize(x[frame][None], affines[frame], out[None], silu=False)
        return out.flatten(0, 1)[None]

    return tokens


def upsample(step: Upsample, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', 2 H, 2 W, C']
    """Double the frames (except the first one of a video), the rows and the columns."""
    if step.time is not None:
        x = double_frames(step.time, run, past, x)
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
        phases = run.kernels.planar.conv(window, step.space, None)  # [n, r + 1, W + 1, 4 C']
        band, _ = run.kernels.planar.interleave(phases, step.bias, 2 * (bottom - top))  # [n, 2 r, 2 W, C']
        out[:, 2 * top : 2 * bottom] = band
    if not step.repeats:
        return out
    return out.repeat_interleave(2, 0)[int(past.place.is_single) :]


def causal_upsample(
    step: CausalUpsample, run: Run, past: VideoPast, x: Tensor
) -> Tensor:  # [n, H, W, C] -> [n', 2 H, 2 W, C']
    """Double rows and columns, and the frames before or after the convolution, as the layer says."""
    n, height, width, _ = x.shape
    is_first = past.of(step) is None
    skipped = step.times - 1 if past.place.is_single else 0  # the first frame is not doubled
    out = x.new_empty(n * step.times - skipped, 2 * height, 2 * width, step.out_channels)
    for top, bottom, window, is_first_frame in windows(step, run, past, x, plain(x)):
        columns = 0 if step.replicates else 1
        if is_first_frame:
            bias = step.bias[: 4 * step.out_channels]
            phases = run.kernels.conv_first(window, step.first, bias, columns, step.first_terms)
        else:
            frames = run.kernels.side_by_side(window, n, step.taps)  # [n, r + 2, W, k C]
            phases = run.kernels.planar.conv(frames, step.weight, step.bias, columns)
        band = run.kernels.interleave(phases, 1 if is_first_frame else step.times)  # [n T, 2 r, 2 W, C]
        out[:, 2 * top : 2 * bottom] = band if is_first_frame else band[skipped:]
    return out if is_first or step.after is None else doubled(out, step.after)


def doubled(x: Tensor, way: Doubling) -> Tensor:  # [n, H, W, C] -> [2 n, H, W, C]
    """Double the frames of a chunk as `Doubling` says."""
    pairs = x.new_empty(len(x), 2, *x.shape[1:])  # [n, 2, H, W, C]
    if way is Doubling.NEAREST:
        pairs[:] = x[:, None]
    else:
        torch.lerp(x, torch.cat([x[:1], x[:-1]]), 0.25, out=pairs[:, 0])
        torch.lerp(x, torch.cat([x[1:], x[-1:]]), 0.25, out=pairs[:, 1])
    return pairs.flatten(0, 1)


def double_frames(time: Linear, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [2 n, H, W, C]
    """Compute two frames from each frame and the two before it. The first frame of a video stays single."""
    if past.place.is_single:
        if not past.is_last:
            past.keep(time, x.new_zeros(2, *x.shape[1:]))  # later frames must not see the first one
        return x
    before = past.of(time)
    assert before is not None
    window = torch.cat([before, x])  # [n + 2, H, W, C]
    if not past.is_last:
        past.keep(time, window[-2:].clone())
    both = F.linear(run.kernels.side_by_side(window, len(x), TAPS), time.weight, time.bias)  # [n, H, W, 2 C]
    n, height, width, channels = x.shape
    pairs = both.view(n, height, width, 2, channels).permute(0, 3, 1, 2, 4)  # [n, 2, H, W, C]
    return pairs.reshape(2 * n, height, width, channels)


def unfold(step: Unfold, run: Run, past: VideoPast, x: Tensor) -> Tensor:  # [n, H, W, C] -> [n', 2 H, 2 W, C']
    """Double rows and columns, and the frames except the first one of a video."""
    times = 1 if past.place.is_single else step.times
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


def add_duplicates_(x: Tensor, entered: Tensor, shortcut: Duplicate, is_single: bool) -> None:
    """Add the shortcut of a block to its output `[n', 2 H, 2 W, C']`. entered: the block's input `[n, H, W, C]`."""
    times, parts = shortcut.times, 4 * shortcut.times
    skipped = times - 1 if is_single else 0
    for part in range(parts):  # the channels of output frame s, row p and column q
        (s, p), q = divmod(part // 2, 2), part % 2
        if s < skipped:
            continue
        sources = (torch.arange(shortcut.out_channels, device=x.device) * parts + part) // shortcut.repeats  # [C']
        x[s - skipped :: times - skipped, p::2, q::2] += entered[..., sources]


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


def unpatch(sample: Tensor, patch: int) -> Tensor:  # [n, H, W, C p p] -> [n, p H, p W, C]
    """Unfold the channels of blocks of pixels. Channels are ordered (c, column, row), as diffusers' `unpatchify`."""
    if patch == 1:
        return sample
    n, height, width, channels = sample.shape
    parts = sample.view(n, height, width, channels // patch**2, patch, patch)  # [n, H, W, C, q, p]
    return parts.permute(0, 1, 5, 2, 4, 3).reshape(n, patch * height, patch * width, channels // patch**2)
