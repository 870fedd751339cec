"""Triton kernels for a GroupNorm of NHWC tensors in two passes, and for what else the exact coders need on a GPU.

The pass that writes a tensor also takes its moments; the pass that reads it normalizes it. A tensor `[B, n, W, C]` is
treated as P = n W pixels of C channels. Every kernel computes in float32 and runs unchanged on a CPU with
TRITON_INTERPRET=1.
"""

# Triton compiles these functions from their source. Its decorator and its pointers have no types.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean(x, mask):
    """Return the mean `[C']` of one tile of pixels x `[P', C']`, at least one of them known."""
    return tl.sum(tl.where(mask, x, 0.0), 0) / tl.maximum(tl.sum(mask.to(tl.float32), 0), 1.0)


@triton.jit
def _store_moments(s1, s2, reference, bias, pixels, mean_ptr, m2_ptr, offset, mask):
    """Store the mean, plus bias, and the M2 of one chunk.

    s1, s2: the sums `[P', C']` of d = x - reference and of its square. The reference is the mean of the chunk's first
    tile, so no two large numbers are subtracted, whatever the mean of x. If this tile is far from the others, then M2
    itself is large, and the subtraction loses no more than a factor of the number of tiles.
    """
    s1 = tl.sum(s1, 0)  # [C']
    s2 = tl.sum(s2, 0)  # [C']
    tl.store(mean_ptr + offset, reference + s1 / pixels + bias, mask=mask)
    tl.store(m2_ptr + offset, tl.maximum(s2 - s1 * s1 / pixels, 0.0), mask=mask)


@triton.jit
def moments_kernel(
    x_ptr, add_ptr, bias_ptr, mean_ptr, m2_ptr, pixels, channels, x_stride, add_stride,
    ADD: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Take the moments of one chunk of pixels.

    With ADD, do x += add + bias in place first. Grid: [K, C / BLOCK_C, B].
    """
    k, c, b = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
    known = c < channels  # [C']
    x_ptr += b.to(tl.int64) * x_stride
    add_ptr += b.to(tl.int64) * add_stride
    first = k.to(tl.int64) * TILES * BLOCK_P
    last = tl.minimum(first + TILES * BLOCK_P, pixels)
    if ADD:
        bias = tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)  # [C']
    reference = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)  # [P']
        mask = (p < last)[:, None] & known[None, :]  # [P', C']
        at = p[:, None] * channels + c[None, :]  # [P', C']
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [P', C']
        if ADD:
            x += tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)
        if tile == 0:
            reference = _mean(x, mask)
        d = tl.where(mask, x - reference[None, :], 0.0)  # [P', C']
        s1 += d
        s2 += d * d
    offset = (k * tl.num_programs(2) + b) * channels + c
    _store_moments(s1, s2, reference, 0.0, (last - first).to(tl.float32), mean_ptr, m2_ptr, offset, known)


@triton.jit
def interleave_kernel(
    phases_ptr, bias_ptr, out_ptr, mean_ptr, m2_ptr, height, width, channels,
    TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write phases [n + 1, W + 1, 4 C] plus bias to [2 n, 2 W, C], and take the moments. Grid: [K, C / BLOCK_C, B]."""
    k, c, b = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
    known = c < channels  # [C']
    pixels = 4 * height * width
    out_ptr += b.to(tl.int64) * pixels * channels
    phases_ptr += b.to(tl.int64) * (height + 1) * (width + 1) * 4 * channels
    first = k.to(tl.int64) * TILES * BLOCK_P
    last = tl.minimum(first + TILES * BLOCK_P, pixels)
    bias = tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)  # [C']
    reference = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        pixel = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)  # [P']
        mask = (pixel < last)[:, None] & known[None, :]  # [P', C']
        y, x = pixel // (2 * width), pixel % (2 * width)  # [P']
        p, q = y % 2, x % 2  # [P'] the phase
        source = ((y // 2 + p) * (width + 1) + x // 2 + q) * 4 + 2 * p + q  # [P']
        value = tl.load(phases_ptr + source[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        # The moments are those without the bias, which is added to the mean at the end.
        if tile == 0:
            reference = _mean(value, mask)
        d = tl.where(mask, value - reference[None, :], 0.0)  # [P', C']
        s1 += d
        s2 += d * d
        value = (value + bias[None, :]).to(out_ptr.dtype.element_ty)  # [P', C']
        tl.store(out_ptr + pixel[:, None] * channels + c[None, :], value, mask=mask)
    offset = (k * tl.num_programs(2) + b) * channels + c
    _store_moments(s1, s2, reference, bias, (last - first).to(tl.float32), mean_ptr, m2_ptr, offset, known)


@triton.jit
def affine_kernel(
    count_ptr, mean_ptr, m2_ptr, offset_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, parts, channels, group, eps,
    OFFSET: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute `GroupNorm.affine` for one group of one image. Grid: [G, B]."""
    b, c = tl.program_id(1), tl.program_id(0) * group + tl.arange(0, BLOCK_C)  # [C']
    known = tl.arange(0, BLOCK_C) < group  # [C']
    offset = tl.zeros([BLOCK_C], tl.float32)
    if OFFSET:
        offset += tl.load(offset_ptr + c, mask=known, other=0.0).to(tl.float32)
    pixels = tl.zeros([BLOCK_K], tl.float32)
    s = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)  # [K']
        n = tl.load(count_ptr + k, mask=k < parts, other=0.0)  # [K']
        at = (k[:, None] * tl.num_programs(1) + b) * channels + c[None, :]  # [K', C']
        mean = tl.load(mean_ptr + at, mask=(k < parts)[:, None] & known[None, :], other=0.0)  # [K', C']
        pixels += n
        s += tl.where(known[None, :], n[:, None] * (mean + offset[None, :]), 0.0)
    total = tl.sum(pixels, 0) * group
    rough = tl.sum(tl.sum(s, 0), 0) / total
    rest = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)  # what rounding left of the centre: the mean of the deviations
    s = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)  # [K']
        n = tl.load(count_ptr + k, mask=k < parts, other=0.0)  # [K']
        at = (k[:, None] * tl.num_programs(1) + b) * channels + c[None, :]  # [K', C']
        mask = (k < parts)[:, None] & known[None, :]  # [K', C']
        d = tl.load(mean_ptr + at, mask=mask, other=0.0) + offset[None, :] - rough  # [K', C']
        rest += tl.where(mask, n[:, None] * d, 0.0)
        s += tl.where(mask, tl.load(m2_ptr + at, mask=mask, other=0.0) + n[:, None] * d * d, 0.0)
    left = tl.sum(tl.sum(rest, 0), 0) / total
    centre = rough + left
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(s, 0), 0) / total - left * left + eps)
    scale = tl.load(weight_ptr + c, mask=known, other=0.0) * rstd  # [C']
    shift = tl.load(bias_ptr + c, mask=known, other=0.0) + scale * (offset - centre)  # [C']
    tl.store(scale_ptr + b * channels + c, scale, mask=known)
    tl.store(shift_ptr + b * channels + c, shift, mask=known)


@triton.jit
def normalize_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, pixels, channels, x_stride, out_stride,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write out = scale * x + shift, with SILU after SiLU. Grid: [P / BLOCK_P, C / BLOCK_C, B]."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P']
    c, b = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]  # [P', C']
    at = p[:, None] * channels + c[None, :]  # [P', C']
    scale = tl.load(scale_ptr + b * channels + c, mask=c < channels, other=0.0)  # [C']
    shift = tl.load(shift_ptr + b * channels + c, mask=c < channels, other=0.0)  # [C']
    x = tl.load(x_ptr + b.to(tl.int64) * x_stride + at, mask=mask, other=0.0).to(tl.float32)  # [P', C']
    y = x * scale[None, :] + shift[None, :]  # [P', C']
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + b.to(tl.int64) * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_kernel(scores_ptr, out_ptr, total_ptr, columns, scale, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the softmax of each row times `scale`, not yet divided by its total, and the total. Grid: [rows].

    The largest value of a row is 1, which half precision represents exactly. One read finds the maximum and the total.
    """
    row_ptr = scores_ptr + tl.program_id(0).to(tl.int64) * columns
    out_ptr += tl.program_id(0).to(tl.int64) * columns
    peak = tl.full([BLOCK], -1e30, tl.float32)  # finite, because -inf - -inf of a lane past the end would be NaN
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)  # [N']
        s = tl.load(row_ptr + at, mask=at < columns, other=float("-inf")) * scale  # [N']
        higher = tl.maximum(peak, s)  # [N']
        total = total * tl.exp(peak - higher) + tl.exp(s - higher)  # [N']
        peak = higher
    highest = tl.max(peak, 0)
    tl.store(total_ptr + tl.program_id(0), tl.sum(total * tl.exp(peak - highest), 0))
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)  # [N']
        s = tl.load(row_ptr + at, mask=at < columns, other=0.0) * scale  # [N']
        p = tl.exp(s - highest)  # [N']
        tl.store(out_ptr + at, p.to(out_ptr.dtype.element_ty), mask=at < columns)
