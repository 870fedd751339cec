"""Triton kernels of the causal coders: norms with SiLU, windows of frames, and interleaving in time and space.

A frame `[r, W, C]` is treated as P = r W pixels of C channels. Frames and rows may have gaps between them, because the
kernels write into windows that also have rows, columns and frames around these. Every kernel computes in float32 and
runs unchanged on a CPU with TRITON_INTERPRET=1.
"""

# Triton compiles these functions from their source. Its decorator and its pointers have no types.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_silu_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, pixels, width, channels, x_stride, out_frame, out_row, eps,
    NORM: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write out = silu(norm(x) * scale + shift). Grid: [P / BLOCK_P, n]; a program has all channels of its pixels.

    NORM: 0 for none; 1 for x / max(|x|, eps); 2 for x / sqrt(mean(x²) + eps). SHIFT, SILU: whether they are applied.
    x_stride, out_frame: from one frame to the next. out_row: from one row of `out` to the next.
    """
    p, f = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    known = c < channels  # [C']
    mask = (p < pixels)[:, None] & known[None, :]  # [P', C']
    x = tl.load(x_ptr + f * x_stride + p[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM == 1:
        x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps)[:, None]
    if NORM == 2:
        x = x / tl.sqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    y = x * tl.load(scale_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]  # [P', C']
    if SHIFT:
        y += tl.load(shift_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = f * out_frame + (p // width) * out_row + (p % width) * channels  # [P']
    tl.store(out_ptr + at[:, None] + c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled_silu_kernel(
    x_ptr, factor_ptr, summand_ptr, out_ptr, pixels, width, channels, ratio, out_row,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write out = silu(x * factor + summand), whose `[r, W / ratio, C]` stand for `ratio` columns each.

    Grid: [P / BLOCK_P, C / BLOCK_C]. out_row: from one row of `out` to the next.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]  # [P', C']
    row, column = p // width, p % width  # [P']
    source = (row * (width // ratio) + column // ratio)[:, None] * channels + c[None, :]  # [P', C']
    factor = tl.load(factor_ptr + source, mask=mask, other=0.0).to(tl.float32)
    summand = tl.load(summand_ptr + source, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + p[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32) * factor + summand
    y = y / (1.0 + tl.exp(-y))
    at = (row * out_row + column * channels)[:, None] + c[None, :]  # [P', C']
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def side_by_side_kernel(
    window_ptr, out_ptr, pixels, channels, frame_stride,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write each frame and the TAPS - 1 before it as channels, oldest first. Grid: [P / BLOCK_P, C / BLOCK_C, n]."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c, f = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2).to(tl.int64)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]  # [P', C']
    out_ptr += f * pixels * TAPS * channels
    for tap in range(TAPS):
        source = (f + tap) * frame_stride + p[:, None] * channels + c[None, :]  # [P', C']
        value = tl.load(window_ptr + source, mask=mask, other=0.0)
        tl.store(out_ptr + (p[:, None] * TAPS + tap) * channels + c[None, :], value, mask=mask)


@triton.jit
def interleave_frames_kernel(
    phases_ptr, out_ptr, height, width, channels, TIMES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write phases [n, r + 1, W + 1, T 2 2 C] to frames [n T, 2 r, 2 W, C]. Grid: [4 r W / BLOCK_P, C / BLOCK_C, n T].

    Pixel (2 i + p, 2 j + q) of frame T k + s is phase (s, p, q) of frame k at (i + p, j + q).
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P']
    c, f = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2).to(tl.int64)
    pixels = 4 * height * width
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]  # [P', C']
    y, x = pixel // (2 * width), pixel % (2 * width)  # [P']
    p, q, s = y % 2, x % 2, f % TIMES
    source = (f // TIMES * (height + 1) + y // 2 + p) * (width + 1) + x // 2 + q  # [P'] the pixel of the phases
    source = (source * TIMES + s) * 4 + 2 * p + q  # [P']
    value = tl.load(phases_ptr + source[:, None] * channels + c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + (f * pixels + pixel)[:, None] * channels + c[None, :], value, mask=mask)
