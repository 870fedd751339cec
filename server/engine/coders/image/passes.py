"""The decoder, layer by layer, each layer a pass over row bands. Nothing here is approximate.

A 3x3 convolution needs one row of its input above and below the band, so bands advance together through one layer, and
a layer starts when the one before is complete: GroupNorm needs the whole picture's statistics anyway. What is stored is
the layer's input, freed row by row as it is consumed, and its output: two pictures at most, never an expanded one.
Where that is too much (`Plan.recomputes`), the layers at the full size keep their output alone: what is between is
computed once for its statistics and again where it is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.moments import Affine, GroupNorm, Moments
from ...kernels.reference import Kernels
from ..interface import Check
from .bands import Picture, Recomputed, Rows, spans
from .layers import Attention, Conv, DecoderStep, DecoderWeights, Downsample, EncoderWeights, Resnet, Upsample
from .plan import Plan

Emit = Callable[[int, Tensor], None]


def decode(
    network: DecoderWeights, kernels: Kernels, plan: Plan, latents: Tensor, emit: Emit, check: Check
) -> None:  # [B, C, h, w]
    """Run the decoder; `emit(top, sample [B, n, W, 3])` receives the image from top to bottom.

    check: called before each band and each chunk of queries.
    """
    x = latents.permute(0, 2, 3, 1).contiguous()  # [B, h, w, C]
    if network.post_quant is not None:
        x = F.linear(x, network.post_quant.weight, network.post_quant.bias)  # [B, h, w, C]
    picture: Rows = first(network.conv_in, kernels, plan, x, check)
    stored = network.steps[: network.full_size.start] if plan.recomputes else network.steps
    for step in stored:
        picture = advance(step, kernels, plan, picture, check)
    for step in network.steps[len(stored) :]:
        picture = advance_recomputing(step, kernels, plan, picture, check)
    last(network.norm_out, network.conv_out, kernels, picture, emit, check)


def encode(
    network: EncoderWeights, kernels: Kernels, plan: Plan, pixels: Tensor, emit: Emit, check: Check
) -> None:  # [B, 3, H, W]
    """Run the encoder; `emit(top, parameters [B, n, w, 2 C])` receives the posterior from top to bottom.

    check: called before each band and each chunk of queries.
    """
    picture = first(network.conv_in, kernels, plan, pixels.permute(0, 2, 3, 1).contiguous(), check)
    recomputed = network.full_size if plan.recomputes else range(0)
    for index, step in enumerate(network.steps):
        match step:
            case Resnet() if index in recomputed:
                picture = resnet_recomputing(step, kernels, picture, check)
            case Resnet():
                picture = resnet(step, kernels, picture, check)
            case Attention():
                picture = attention(step, kernels, plan, picture, check)
            case Downsample():
                picture = downsample(step.conv, kernels, plan, picture, check)
    last(network.norm_out, network.conv_out, kernels, picture, emit, check)


def advance(step: DecoderStep, kernels: Kernels, plan: Plan, x: Rows, check: Check) -> Picture:
    assert isinstance(x, Picture)
    match step:
        case Resnet():
            return resnet(step, kernels, x, check)
        case Attention():
            return attention(step, kernels, plan, x, check)
        case Upsample():
            return upsample(step.conv, kernels, plan, x, check)


def advance_recomputing(step: DecoderStep, kernels: Kernels, plan: Plan, x: Rows, check: Check) -> Rows:
    match step:
        case Resnet():
            return resnet_recomputing(step, kernels, x, check)
        case Upsample():
            return upsample_recomputing(step.conv, kernels, plan, x, check)
        case Attention():
            raise AssertionError("the attention comes before the last upsample")


def first(conv: Conv, kernels: Kernels, plan: Plan, x: Tensor, check: Check) -> Picture:  # [B, H, W, C]
    whole = Picture(unit=1)
    whole.append(x)
    picture = Picture(plan.unit_rows(x.shape[2], conv.out_channels))
    for top, bottom in spans(x.shape[1], plan.rows(x.shape[2], conv.out_channels)):
        check()
        band = kernels.conv(with_halo(kernels, whole, top, bottom), conv.weight, conv.bias)
        picture.append(band, kernels.moments(band, picture.unit))  # [B, n, w, C']
    return picture


def resnet(block: Resnet, kernels: Kernels, x: Picture, check: Check) -> Picture:
    hidden = Picture(x.unit)
    residual = x if block.shortcut is None else Picture(x.unit)

    norm1 = kernels.affine(block.norm1, x.moments)
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, x, top, bottom, norm1)  # [B, n + 2, W, C]
        # conv1's bias is left out: a constant per channel only moves the mean that norm2 takes away again.
        y = kernels.conv(y, block.conv1.weight, None)  # [B, n, W, C']
        hidden.append(y, kernels.moments(y, x.unit))
        if block.shortcut is not None:
            (band,) = x.rows(top, bottom)  # [B, n, W, C]
            residual.append(F.linear(band, block.shortcut.weight, block.shortcut.bias))  # [B, n, W, C']
            del band
            x.release_above(bottom - 1)

    norm2 = kernels.affine(block.norm2, hidden.moments, offset=block.conv1.bias)
    residual.moments = []
    for index, (top, bottom) in enumerate(residual.spans):
        check()
        y = with_halo(kernels, hidden, top, bottom, norm2)  # [B, n + 2, W, C']
        band = residual.band(index)  # [B, n, W, C']
        residual.moments.append(kernels.add_conv_(band, y, block.conv2.weight, block.conv2.bias, x.unit))
        hidden.release_above(bottom - 1)
    return residual


def upsample(conv: Conv, kernels: Kernels, plan: Plan, x: Picture, check: Check) -> Picture:
    width = x.band(0).shape[2]
    picture = Picture(plan.unit_rows(2 * width, conv.out_channels))
    for top, bottom in spans(x.height, max(1, plan.rows(2 * width, conv.out_channels) // 2)):
        check()
        y = with_halo(kernels, x, top, bottom)  # [B, n + 2, W, C]
        phases = kernels.conv(y, conv.weight, None)  # [B, n + 1, W + 1, 4 C']
        x.release_above(bottom - 1)
        picture.append(*kernels.interleave(phases, conv.bias, picture.unit))  # [B, 2 n, 2 W, C']
    return picture


def resnet_recomputing(block: Resnet, kernels: Kernels, x: Rows, check: Check) -> Picture:
    norm1 = kernels.affine(block.norm1, x.moments)

    def conv1(top: int, bottom: int) -> Tensor:  # [B, n, W, C']
        check()
        return kernels.conv(with_halo(kernels, x, top, bottom, norm1), block.conv1.weight, None)

    hidden = Recomputed(x.unit, x.spans, conv1, lambda row: x.release_above(row - 1))
    hidden.moments = [kernels.moments(conv1(top, bottom), x.unit) for top, bottom in x.spans]
    norm2 = kernels.affine(block.norm2, hidden.moments, offset=block.conv1.bias)
    total = Picture(x.unit)  # not x in place: the next band's hidden rows are made of this band's x
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, hidden, top, bottom, norm2)  # [B, n + 2, W, C']
        (band,) = x.rows(top, bottom)  # [B, n, W, C]
        change = block.shortcut
        band = F.linear(band, change.weight, change.bias) if change else band.clone()  # [B, n, W, C']
        total.append(band, kernels.add_conv_(band, y, block.conv2.weight, block.conv2.bias, x.unit))
        hidden.release_above(bottom - 1)
    return total


def upsample_recomputing(conv: Conv, kernels: Kernels, plan: Plan, x: Rows, check: Check) -> Recomputed:
    (row,) = x.rows(0, 1)  # [B, 1, W, C]
    width = 2 * row.shape[2]

    def grown(top: int, bottom: int) -> tuple[Tensor, Moments]:  # rows of x -> [B, 2 n, 2 W, C']
        check()
        phases = kernels.conv(with_halo(kernels, x, top, bottom), conv.weight, None)  # [B, n + 1, W + 1, 4 C']
        return kernels.interleave(phases, conv.bias, picture.unit)

    def rows(top: int, bottom: int) -> Tensor:  # [B, n, 2 W, C']
        first = top // 2
        return grown(first, (bottom + 1) // 2)[0][:, top - 2 * first : bottom - 2 * first]

    bands = spans(x.height, max(1, plan.rows(width, conv.out_channels) // 2))
    unit, doubled = plan.unit_rows(width, conv.out_channels), [(2 * top, 2 * bottom) for top, bottom in bands]
    picture = Recomputed(unit, doubled, rows, lambda row: x.release_above(row // 2 - 1))
    picture.moments = [grown(top, bottom)[1] for top, bottom in bands]
    return picture


def attention(block: Attention, kernels: Kernels, plan: Plan, x: Picture, check: Check) -> Picture:
    """Every position attends to all positions; only the queries are taken in chunks."""
    affine = kernels.affine(block.norm, x.moments)
    whole = x.whole()  # [B, h, w, C]
    tokens = torch.empty_like(whole)  # [B, h, w, C]
    kernels.normalize(whole, affine, tokens, silu=False)
    tokens = tokens.flatten(1, 2)  # [B, N, C]
    key = F.linear(tokens, block.key.weight)  # [B, N, C]
    value = F.linear(tokens, block.value.weight)  # [B, N, C]
    residual = whole.flatten(1, 2)  # [B, N, C]
    for start, stop in spans(tokens.shape[1], plan.query_rows(tokens.shape[1])):
        check()
        query = F.linear(tokens[:, start:stop], block.query.weight, block.query.bias)  # [B, t, C]
        residual[:, start:stop] += kernels.attend(query, key, value).add_(block.bias)  # [B, t, C]
    x.moments = [kernels.moments(whole, x.unit)]
    return x


def last(norm: GroupNorm, conv: Conv, kernels: Kernels, x: Rows, emit: Emit, check: Check) -> None:
    affine = kernels.affine(norm, x.moments)
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, x, top, bottom, affine)  # [B, n + 2, W, C]
        x.release_above(bottom - 1)
        emit(top, kernels.conv(y, conv.weight, conv.bias))  # [B, n, W, 3]


def with_halo(kernels: Kernels, x: Rows, top: int, bottom: int, affine: Affine | None = None) -> Tensor:
    """Rows [top - 1, bottom + 1) of x, of silu(affine(x)) if given; rows outside the picture are the zero padding."""
    return padded(kernels, x, top - 1, bottom + 1, affine)


def padded(
    kernels: Kernels, x: Rows, top: int, bottom: int, affine: Affine | None = None, columns: int = 0
) -> Tensor:  # [B, bottom - top, W + columns, C]
    """Rows [top, bottom) of x, of silu(affine(x)) if given; what is above, below or to the right of x is zero."""
    pieces = list(x.rows(top, bottom))  # each [B, some rows, W, C]
    batch, _, width, channels = pieces[0].shape
    y = pieces[0].new_empty(batch, bottom - top, width + columns, channels)  # [B, n, W + columns, C]
    row = max(0, -top)
    y[:, :row], y[:, x.height - top :], y[:, :, width:] = 0, 0, 0
    for piece in pieces:
        part = y[:, row : row + piece.shape[1], :width]  # [B, some rows, W, C]
        if affine is None:
            part.copy_(piece)
        else:
            kernels.normalize(piece, affine, part, silu=True)
        row += piece.shape[1]
    return y


def downsample(conv: Conv, kernels: Kernels, plan: Plan, x: Picture, check: Check) -> Picture:
    """Row i sees rows 2i to 2i + 2; the row below the picture and the column to its right are zero."""
    width = x.band(0).shape[2] // 2
    picture = Picture(plan.unit_rows(width, conv.out_channels))
    for top, bottom in spans(x.height // 2, plan.rows(width, conv.out_channels)):
        check()
        y = padded(kernels, x, 2 * top, 2 * bottom + 1, columns=1)  # [B, 2 n + 1, W + 1, C]
        x.release_above(2 * bottom)
        band = kernels.conv(y, conv.weight, conv.bias, columns=0, stride=2)  # [B, n, W / 2, C']
        picture.append(band, kernels.moments(band, picture.unit))
    return picture
