"""The kernels of a causal coder on a CUDA GPU: norms with SiLU and interleaving by Triton, convolutions by cuDNN."""

# Triton has no types, and is not installed everywhere.
# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import triton_causal_kernels as programs
from .causal_kernels import SMALLEST_NORM, CausalKernels
from .moments import Affine

VALUES = 8192  # pixels times channels that a program computes
BLOCK_P, BLOCK_C = 32, 128
NONE, LENGTH, MEAN_SQUARE = range(3)
"""How `norm_silu_kernel` normalizes a pixel."""


class TritonCausalKernels(CausalKernels):
    """Causal kernels for a CUDA GPU. Inputs have contiguous rows; outputs may be parts of larger windows."""

    def norm_silu(self, x: Tensor, weight: Tensor, out: Tensor) -> None:  # [n, r, W, C], [C], [n, r, W, C]
        """Normalize as `CausalKernels.norm_silu` says, in one launch."""
        _normalize(x, weight, None, out, LENGTH, SMALLEST_NORM, silu=True)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:  # [n, r, W, C], [C] -> [n, r, W, C]
        """Normalize as `CausalKernels.norm` says, in one launch."""
        out = torch.empty_like(x)  # [n, r, W, C]
        _normalize(x, weight, None, out, LENGTH, SMALLEST_NORM, silu=False)
        return out

    def rms_norm_silu(
        self, x: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None, out: Tensor
    ) -> None:  # [n, r, W, C], [C] twice, [n, r, W, C]
        """Normalize as `CausalKernels.rms_norm_silu` says, in one launch."""
        ones = torch.ones(x.shape[-1], device=x.device) if scale is None else scale  # [C]
        _normalize(x, ones, shift, out, MEAN_SQUARE, eps, silu=True)

    def affine_silu(self, x: Tensor, affine: Affine, out: Tensor) -> None:  # [r, W, C] twice
        """Compute as `CausalKernels.affine_silu` says, in one launch."""
        _normalize(x[None], affine.scale[0], affine.shift[0], out[None], NONE, 0.0, silu=True)

    def scaled_silu(
        self, x: Tensor, affine: Affine, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:  # [r, W, C], [r, w, C] twice, [r, W, C]
        """Compute as `CausalKernels.scaled_silu` says, in one launch for these rows."""
        rows, width, channels = x.shape
        factor = (affine.scale * scale.float()).contiguous()  # [r, w, C]
        summand = (affine.shift * scale.float() + shift.float()).contiguous()  # [r, w, C]
        pixels, block_c = rows * width, min(BLOCK_C, triton.next_power_of_2(channels))
        grid = (triton.cdiv(pixels, BLOCK_P), triton.cdiv(channels, block_c))
        programs.scaled_silu_kernel[grid](
            x, factor, summand, out, pixels, width, channels, width // scale.shape[1], out.stride(0),
            BLOCK_P=BLOCK_P, BLOCK_C=block_c,
        )  # fmt: skip

    def interleave(self, phases: Tensor, times: int) -> Tensor:  # [n, r + 1, W + 1, T 2 2 C] -> [n T, 2 r, 2 W, C]
        """Interleave as `CausalKernels.interleave` says, in one launch."""
        n, rows, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
        channels = phases.shape[3] // (4 * times)
        out = phases.new_empty(n * times, 2 * rows, 2 * width, channels)
        block_c = min(BLOCK_C, triton.next_power_of_2(channels))
        grid = (triton.cdiv(4 * rows * width, BLOCK_P), triton.cdiv(channels, block_c), n * times)
        programs.interleave_frames_kernel[grid](
            phases, out, rows, width, channels, TIMES=times, BLOCK_P=BLOCK_P, BLOCK_C=block_c
        )
        return out


def _normalize(
    x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor, norm: int, eps: float, *, silu: bool
) -> None:  # [n, r, W, C], [C] twice, [n, r, W, C]
    frames, rows, width, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    block_p = max(1, VALUES // block_c)
    programs.norm_silu_kernel[(triton.cdiv(rows * width, block_p), frames)](
        x, scale, scale if shift is None else shift, out, rows * width, width, channels,
        x.stride(0), out.stride(0), out.stride(1), eps,
        NORM=norm, SHIFT=shift is not None, SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
