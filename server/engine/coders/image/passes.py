"""The passes of the exact coders over row bands, one for each kind of layer. Nothing here is approximate.

A 3x3 convolution needs one row of its input above and one below each band. All bands of an activation therefore pass
one layer before any of them enters the next, which GroupNorm requires anyway: it needs the statistics of the whole
activation. A pass stores the input of its layer, freed band by band as it is read, and the output: two activations at
most. An upsample and its convolution are one operation, so that the upsampled activation is never stored.

If that needs too much memory (`Plan.recomputes`), the layers at the full size store only their output. The activation
inside a layer is computed once for its statistics, and again when it is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.moments import Affine, GroupNorm, Moments
from ...kernels.reference import Kernels
from ..interface import Check
from .bands import Activation, Bands, Recomputed, spans
from .layers import Attention, Conv, DecoderStep, DecoderWeights, Downsample, EncoderWeights, Resnet, Upsample
from .plan import Plan

WriteRows = Callable[[int, Tensor], None]
"""Takes finished rows `[B, n, W, C]` of the output and the number of their first row, from top to bottom."""


def decode(
    network: DecoderWeights, kernels: Kernels, plan: Plan, latents: Tensor, write: WriteRows, check: Check
) -> None:  # [B, C, h, w]
    """Decode latents `[B, C, h, w]`.

    write: receives the rows of the sample `[B, n, W, 3]`, top to bottom.
    check: called before each band and each chunk of queries.
    """
    x = latents.permute(0, 2, 3, 1).contiguous()  # [B, h, w, C]
    if network.post_quant is not None:
        x = F.linear(x, network.post_quant.weight, network.post_quant.bias)  # [B, h, w, C]
    activation: Activation = first(network.conv_in, kernels, plan, x, check)
    stored = network.steps[: network.full_size.start] if plan.recomputes else network.steps
    for step in stored:
        activation = advance(step, kernels, plan, activation, check)
    for step in network.steps[len(stored) :]:
        activation = advance_recomputing(step, kernels, plan, activation, check)
    last(network.norm_out, network.conv_out, kernels, activation, write, check)


def encode(
    network: EncoderWeights, kernels: Kernels, plan: Plan, pixels: Tensor, write: WriteRows, check: Check
) -> None:  # [B, 3, H, W]
    """Encode pixels `[B, 3, H, W]` in [-1, 1].

    write: receives the rows of the posterior's parameters `[B, n, w, 2 C]`, top to bottom.
    check: called before each band and each chunk of queries.
    """
    activation = first(network.conv_in, kernels, plan, pixels.permute(0, 2, 3, 1).contiguous(), check)
    recomputed = network.full_size if plan.recomputes else range(0)
    for index, step in enumerate(network.steps):
        match step:
            case Resnet() if index in recomputed:
                activation = resnet_recomputing(step, kernels, activation, check)
            case Resnet():
                activation = resnet(step, kernels, activation, check)
            case Attention():
                activation = attention(step, kernels, plan, activation, check)
            case Downsample():
                activation = downsample(step.conv, kernels, plan, activation, check)
    last(network.norm_out, network.conv_out, kernels, activation, write, check)


def advance(step: DecoderStep, kernels: Kernels, plan: Plan, x: Activation, check: Check) -> Bands:
    """Apply one step of the decoder to stored bands."""
    assert isinstance(x, Bands)
    match step:
        case Resnet():
            return resnet(step, kernels, x, check)
        case Attention():
            return attention(step, kernels, plan, x, check)
        case Upsample():
            return upsample(step.conv, kernels, plan, x, check)


def advance_recomputing(step: DecoderStep, kernels: Kernels, plan: Plan, x: Activation, check: Check) -> Activation:
    """Apply one step of the decoder at the full size, storing only its output or nothing."""
    match step:
        case Resnet():
            return resnet_recomputing(step, kernels, x, check)
        case Upsample():
            return upsample_recomputing(step.conv, kernels, plan, x, check)
        case Attention():
            raise AssertionError("the attention comes before the last upsample")


def first(conv: Conv, kernels: Kernels, plan: Plan, x: Tensor, check: Check) -> Bands:  # [B, H, W, C]
    """Apply the first convolution to a whole tensor `[B, H, W, C]`."""
    whole = Bands(unit=1)
    whole.append(x)
    output = Bands(plan.unit_rows(x.shape[2], conv.out_channels))
    for top, bottom in spans(x.shape[1], plan.rows(x.shape[2], conv.out_channels)):
        check()
        band = kernels.conv(with_halo(kernels, whole, top, bottom), conv.weight, conv.bias)
        output.append(band, kernels.moments(band, output.unit))  # [B, n, w, C']
    return output


def resnet(block: Resnet, kernels: Kernels, x: Bands, check: Check) -> Bands:
    """Apply a residual block. x is released while it is read, or becomes the output if there is no shortcut."""
    hidden = Bands(x.unit)
    residual = x if block.shortcut is None else Bands(x.unit)

    norm1 = kernels.affine(block.norm1, x.moments)
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, x, top, bottom, norm1)  # [B, n + 2, W, C]
        # conv1's bias is left out: norm2 takes it into account, as an offset of the mean that it subtracts.
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


def upsample(conv: Conv, kernels: Kernels, plan: Plan, x: Bands, check: Check) -> Bands:
    """Apply an upsample: input rows [top, bottom) become output rows [2 top, 2 bottom)."""
    width = x.band(0).shape[2]
    output = Bands(plan.unit_rows(2 * width, conv.out_channels))
    for top, bottom in spans(x.height, max(1, plan.rows(2 * width, conv.out_channels) // 2)):
        check()
        y = with_halo(kernels, x, top, bottom)  # [B, n + 2, W, C]
        phases = kernels.conv(y, conv.weight, None)  # [B, n + 1, W + 1, 4 C']
        x.release_above(bottom - 1)
        output.append(*kernels.interleave(phases, conv.bias, output.unit))  # [B, 2 n, 2 W, C']
    return output


def resnet_recomputing(block: Resnet, kernels: Kernels, x: Activation, check: Check) -> Bands:
    """Apply a residual block without storing the output of conv1.

    That output is computed once for its statistics, and again when it is read.
    """
    norm1 = kernels.affine(block.norm1, x.moments)

    def conv1(top: int, bottom: int) -> Tensor:  # [B, n, W, C']
        check()
        return kernels.conv(with_halo(kernels, x, top, bottom, norm1), block.conv1.weight, None)

    hidden = Recomputed(x.unit, x.spans, conv1, lambda row: x.release_above(row - 1))
    hidden.moments = [kernels.moments(conv1(top, bottom), x.unit) for top, bottom in x.spans]
    norm2 = kernels.affine(block.norm2, hidden.moments, offset=block.conv1.bias)
    total = Bands(x.unit)  # x is not overwritten: the next band's halo is computed from the x of this band
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, hidden, top, bottom, norm2)  # [B, n + 2, W, C']
        (band,) = x.rows(top, bottom)  # [B, n, W, C]
        change = block.shortcut
        band = F.linear(band, change.weight, change.bias) if change else band.clone()  # [B, n, W, C']
        total.append(band, kernels.add_conv_(band, y, block.conv2.weight, block.conv2.bias, x.unit))
        hidden.release_above(bottom - 1)
    return total


def upsample_recomputing(conv: Conv, kernels: Kernels, plan: Plan, x: Activation, check: Check) -> Recomputed:
    """Return an upsampled activation that is computed when it is read. Its statistics are computed now."""
    (row,) = x.rows(0, 1)  # [B, 1, W, C]
    width = 2 * row.shape[2]

    def upsampled(top: int, bottom: int) -> tuple[Tensor, Moments]:  # rows of x -> [B, 2 n, 2 W, C']
        check()
        phases = kernels.conv(with_halo(kernels, x, top, bottom), conv.weight, None)  # [B, n + 1, W + 1, 4 C']
        return kernels.interleave(phases, conv.bias, output.unit)

    def rows(top: int, bottom: int) -> Tensor:  # [B, n, 2 W, C']
        first = top // 2
        return upsampled(first, (bottom + 1) // 2)[0][:, top - 2 * first : bottom - 2 * first]

    inputs = spans(x.height, max(1, plan.rows(width, conv.out_channels) // 2))
    unit, outputs = plan.unit_rows(width, conv.out_channels), [(2 * top, 2 * bottom) for top, bottom in inputs]
    output = Recomputed(unit, outputs, rows, lambda row: x.release_above(row // 2 - 1))
    output.moments = [upsampled(top, bottom)[1] for top, bottom in inputs]
    return output


def attention(block: Attention, kernels: Kernels, plan: Plan, x: Bands, check: Check) -> Bands:
    """Apply an attention to x in place. The queries are taken in chunks; each attends to all positions at once."""
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


def last(norm: GroupNorm, conv: Conv, kernels: Kernels, x: Activation, write: WriteRows, check: Check) -> None:
    """Apply the last norm, SiLU and convolution, and write the result band by band."""
    affine = kernels.affine(norm, x.moments)
    for top, bottom in x.spans:
        check()
        y = with_halo(kernels, x, top, bottom, affine)  # [B, n + 2, W, C]
        x.release_above(bottom - 1)
        write(top, kernels.conv(y, conv.weight, conv.bias))  # [B, n, W, 3]


def with_halo(kernels: Kernels, x: Activation, top: int, bottom: int, affine: Affine | None = None) -> Tensor:
    """Return the rows [top - 1, bottom + 1) of x, or of silu(affine(x)) if `affine` is given, `[B, n + 2, W, C]`.

    Rows outside the activation are zero: they are the padding of the convolution.
    """
    return padded(kernels, x, top - 1, bottom + 1, affine)


def padded(
    kernels: Kernels, x: Activation, top: int, bottom: int, affine: Affine | None = None, columns: int = 0
) -> Tensor:  # [B, bottom - top, W + columns, C]
    """Return the rows [top, bottom) of x, or of silu(affine(x)) if `affine` is given.

    columns: how many columns to add on the right. Values outside the activation are zero.
    """
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


def downsample(conv: Conv, kernels: Kernels, plan: Plan, x: Bands, check: Check) -> Bands:
    """Apply a downsample: output row i reads the input rows 2i to 2i + 2.

    The row below the input and the column on its right are zero.
    """
    width = x.band(0).shape[2] // 2
    output = Bands(plan.unit_rows(width, conv.out_channels))
    for top, bottom in spans(x.height // 2, plan.rows(width, conv.out_channels)):
        check()
        y = padded(kernels, x, 2 * top, 2 * bottom + 1, columns=1)  # [B, 2 n + 1, W + 1, C]
        x.release_above(2 * bottom)
        band = kernels.conv(y, conv.weight, conv.bias, columns=0, stride=2)  # [B, n, W / 2, C']
        output.append(band, kernels.moments(band, output.unit))
    return output
