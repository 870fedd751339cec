"""GPU kernels: convolutions by cuDNN, matrix products by cuBLAS, and everything between them by Triton.

A Triton kernel that follows a convolution also adds its bias, which saves the separate pass that cuDNN needs for it.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_causal_kernels, triton_kernels
from .moments import Affine, GroupNorm, Moments
from .reference import Kernels

# One program reduces BLOCK_P pixels x BLOCK_C channels at a time. 1024 programs are enough to fill the largest GPU.
BLOCK_P, BLOCK_C = 32, 128
PROGRAMS = 1024
BLOCK_K = 128  # how many parts of the statistics one step of a program merges
SOFTMAX_BLOCK = 4096  # how many scores one step of a program reads
HAS_FLOAT32_OUTPUT = hasattr(torch.ops.aten.bmm, "dtype")  # whether torch multiplies half precision to float32


class TritonKernels(Kernels):
    """Kernels for a CUDA GPU.

    `unit` has no effect here: the parts of the statistics depend on the size of the input.
    """

    def add_conv_(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, unit: int) -> Moments:
        """Convolve and add as `Kernels.add_conv_` says. One pass adds the result and the bias and takes the moments."""
        return self._moments(total, self.conv(x, weight, None), bias)

    def moments(self, x: Tensor, unit: int) -> Moments:  # [B, n, W, C]
        """Return the moments of x, in as many parts as fill the GPU."""
        return self._moments(x, None, None)

    def _moments(self, x: Tensor, add: Tensor | None, bias: Tensor | None) -> Moments:  # [B, n, W, C] twice, [C]
        """Add `add` and `bias`, if given, to x in place; return the moments of the sum."""
        pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
        grid, tiles, moments, block_c = _chunks(x, pixels, channels)
        triton_kernels.moments_kernel[grid](
            x, x if add is None else add, x if bias is None else bias, moments.mean, moments.m2,
            pixels, channels, x.stride(0), (x if add is None else add).stride(0),
            ADD=add is not None, TILES=tiles, BLOCK_P=BLOCK_P, BLOCK_C=block_c,
        )  # fmt: skip
        return moments

    def affine(self, norm: GroupNorm, parts: Sequence[Moments], offset: Tensor | None = None) -> Affine:
        """Merge the parts as `GroupNorm.affine` says, in one launch."""
        count = torch.cat([part.count for part in parts]) if len(parts) > 1 else parts[0].count  # [K]
        mean = torch.cat([part.mean for part in parts]) if len(parts) > 1 else parts[0].mean  # [K, B, C]
        m2 = torch.cat([part.m2 for part in parts]) if len(parts) > 1 else parts[0].m2  # [K, B, C]
        k, batch, channels = mean.shape
        scale, shift = torch.empty_like(mean[0]), torch.empty_like(mean[0])  # [B, C]
        group = channels // norm.groups
        triton_kernels.affine_kernel[(norm.groups, batch)](
            count, mean, m2, norm.weight if offset is None else offset, norm.weight, norm.bias, scale, shift,
            k, channels, group, norm.eps, OFFSET=offset is not None,
            TILES=_rounded(triton.cdiv(k, BLOCK_K)), BLOCK_K=BLOCK_K, BLOCK_C=triton.next_power_of_2(group),
        )  # fmt: skip
        return Affine(scale, shift)

    def normalize(self, x: Tensor, affine: Affine, out: Tensor, *, silu: bool) -> None:
        """Normalize as `Kernels.normalize` says, in one launch."""
        batch, pixels, channels = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
        block_c = min(BLOCK_C, triton.next_power_of_2(channels))
        grid = (triton.cdiv(pixels, BLOCK_P), triton.cdiv(channels, block_c), batch)
        triton_kernels.normalize_kernel[grid](
            x, affine.scale, affine.shift, out, pixels, channels, x.stride(0), out.stride(0),
            SILU=silu, BLOCK_P=BLOCK_P, BLOCK_C=block_c,
        )  # fmt: skip

    def interleave(self, phases: Tensor, bias: Tensor, unit: int) -> tuple[Tensor, Moments]:  # [B, n + 1, W + 1, 4 C]
        """Interleave as `Kernels.interleave` says. The same launch takes the moments."""
        batch, n, width, channels = (phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1, phases.shape[3] // 4)
        out = phases.new_empty(batch, 2 * n, 2 * width, channels)  # [B, 2 n, 2 W, C]
        grid, tiles, moments, block_c = _chunks(out, 4 * n * width, channels)
        triton_kernels.interleave_kernel[grid](
            phases,
            bias,
            out,
            moments.mean,
            moments.m2,
            n,
            width,
            channels,
            TILES=tiles,
            BLOCK_P=BLOCK_P,
            BLOCK_C=block_c,
        )  # fmt: skip
        return out, moments

    def side_by_side(
        self, window: Tensor, frames: int, taps: int
    ) -> Tensor:  # [n + taps - 1, r, W, C] -> [n, r, W, taps C]
        """Return frames side by side as `Kernels.side_by_side` says, in one launch."""
        rows, width, channels = window.shape[1:]
        out = window.new_empty(frames, rows, width, taps * channels)  # [n, r, W, taps C]
        pixels, block_c = rows * width, min(BLOCK_C, triton.next_power_of_2(channels))
        grid = (triton.cdiv(pixels, BLOCK_P), triton.cdiv(channels, block_c), frames)
        triton_causal_kernels.side_by_side_kernel[grid](
            window, out, pixels, channels, window.stride(0), TAPS=taps, BLOCK_P=BLOCK_P, BLOCK_C=block_c
        )
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, t, C], [B, N, C] twice -> [B, t, C]
        """Attend as `Kernels.attend` says, with scores in float32: in half precision they may overflow or be coarse."""
        scores = _products(query, key.transpose(1, 2))  # [B, t, N]
        columns, weights = scores.shape[2], torch.empty_like(scores, dtype=query.dtype)  # [B, t, N]
        totals = scores.new_empty(*scores.shape[:2], 1)  # [B, t, 1]
        block = min(SOFTMAX_BLOCK, triton.next_power_of_2(columns))
        triton_kernels.softmax_kernel[(scores.shape[0] * scores.shape[1],)](
            scores, weights, totals, columns, query.shape[-1] ** -0.5,
            TILES=_rounded(triton.cdiv(columns, block)), BLOCK=block, num_warps=8,
        )  # fmt: skip
        return (_products(weights, value) / totals).to(query.dtype)  # [B, t, C]


def _products(a: Tensor, b: Tensor) -> Tensor:  # [B, n, k], [B, k, m] -> [B, n, m]
    """Return a product of matrices in float32, which is also what the GPU adds up in for half precision."""
    if a.is_cuda and a.dtype != torch.float32 and HAS_FLOAT32_OUTPUT:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _rounded(tiles: int) -> int:
    """Return the next power of two, because each number of tiles compiles another kernel."""
    rounded: int = triton.next_power_of_2(tiles)
    return rounded


def _chunks(x: Tensor, pixels: int, channels: int) -> tuple[Any, int, Moments, int]:
    """Split x's pixels into chunks of equal size, each reduced by one program.

    Returns the grid, how many tiles of BLOCK_P pixels a chunk has, the moments for the kernel to fill in (their count
    is set already), and how many channels a program takes.
    """
    batch, block_c = x.shape[0], min(BLOCK_C, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block_c)
    wanted = max(1, PROGRAMS // (blocks * batch))
    tiles = _rounded(triton.cdiv(pixels, BLOCK_P * wanted))
    chunk = tiles * BLOCK_P
    k = triton.cdiv(pixels, chunk)
    first = torch.arange(k, device=x.device, dtype=torch.float32) * chunk  # [K]
    count = (pixels - first).clamp(max=chunk)  # [K]
    mean = torch.empty(k, batch, channels, device=x.device, dtype=torch.float32)  # [K, B, C]
    return (k, blocks, batch), tiles, Moments(count, mean, torch.empty_like(mean)), block_c
