"""Causal convolutions, per-pixel norms and interleaving, in plain torch. Frames are `[n, H, W, C]`, contiguous."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Affine
from .reference import TAPS, Kernels

__all__ = ["TAPS", "CausalKernels"]

SMALLEST_NORM = 1e-12  # as F.normalize


class CausalKernels:
    """The operations of a causal coder. planar: the operations on images of the same device."""

    def __init__(self, planar: Kernels) -> None:
        self.planar = planar

    @property
    def note(self) -> str | None:
        """Why these are not the fastest kernels, as `Kernels.note` says."""
        return self.planar.note

    def pack(self, weight: Tensor) -> Tensor:  # [O, I, 3, 3, 3]
        """Return a weight in the layout that `conv` expects, as `Kernels.pack_frames` says."""
        return self.planar.pack_frames(weight)

    def conv(
        self, window: Tensor, weight: Tensor, bias: Tensor, columns: int
    ) -> Tensor:  # [n + 2, r + 2, W + 2 - 2 columns, I] -> [n, r, W, O]
        """Convolve each frame with the two before it.

        The window contains a row above and one below. columns: how many columns of zeros are added left and right.
        """
        return self.planar.conv_frames(window, weight, bias, columns)

    def conv_first(
        self, window: Tensor, weight: Tensor, bias: Tensor, columns: int, terms: int = 1
    ) -> Tensor:  # [1, r + 2, W + 2 - 2 columns, I] -> [1, r, W, O]
        """Convolve the first frame of a video, which has none before it.

        columns: as for `conv`. terms: the weight is the sum of this many weights, which are side by side.
        """
        return self.planar.conv(torch.cat([window] * terms, -1) if terms > 1 else window, weight, bias, columns)

    def side_by_side(
        self, window: Tensor, frames: int, taps: int
    ) -> Tensor:  # [n + taps - 1, r, W, C] -> [n, r, W, taps C]
        """Return every frame with those before it, oldest first, as channels."""
        return self.planar.side_by_side(window, frames, taps)

    def interleave(self, phases: Tensor, times: int) -> Tensor:  # [n, r + 1, W + 1, T 2 2 C] -> [n T, 2 r, 2 W, C]
        """Return the upsampled frames.

        Pixel (2 i + p, 2 j + q) of frame T k + s is phase (s, p, q) of frame k at (i + p, j + q).
        """
        n, rows, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
        channels = phases.shape[3] // (4 * times)
        out = phases.new_empty(n, times, rows, 2, width, 2, channels)  # [n, T, r, 2, W, 2, C]
        for index, phase in enumerate(torch.split(phases, channels, dim=3)):  # [n, r + 1, W + 1, C]
            (s, p), q = divmod(index // 2, 2), index % 2
            out[:, s, :, p, :, q] = phase[:, p : rows + p, q : width + q]
        return out.view(n * times, 2 * rows, 2 * width, channels)

    def norm_silu(self, x: Tensor, weight: Tensor, out: Tensor) -> None:  # [n, r, W, C], [C], [n, r, W, C]
        """Write silu(x / ||x|| * weight) to `out`, computed in float32."""
        y = self._normalized(x, weight)
        out.copy_(F.silu(y, inplace=True))

    def affine_silu(self, x: Tensor, affine: Affine, out: Tensor) -> None:  # [r, W, C] twice
        """Write silu(scale * x + shift) to `out`. affine: the map of one image."""
        if out.is_contiguous():
            self.planar.normalize(x[None], affine, out[None], silu=True)
        else:
            y = torch.empty_like(x)  # [r, W, C]
            self.planar.normalize(x[None], affine, y[None], silu=True)
            out.copy_(y)

    def scaled_silu(
        self, x: Tensor, affine: Affine, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:  # [r, W, C], [r, w, C] twice, [r, W, C]
        """Write silu((affine of x) * scale + shift) to `out`, each value of scale and shift for W / w columns."""
        rows, width, channels = scale.shape
        factor = affine.scale * scale.float()  # [r, w, C]
        summand = affine.shift * scale.float() + shift.float()  # [r, w, C]
        y = torch.addcmul(summand[:, :, None], x.float().view(rows, width, -1, channels), factor[:, :, None])
        out.copy_(F.silu(y, inplace=True).flatten(1, 2))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:  # [n, r, W, C], [C] -> [n, r, W, C]
        """Return x / ||x|| * weight, computed in float32."""
        return self._normalized(x, weight).to(x.dtype)

    def rms_norm_silu(
        self, x: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None, out: Tensor
    ) -> None:  # [n, r, W, C], [C] twice, [n, r, W, C]
        """Write silu(x / sqrt(mean(x²) + eps) * scale + shift) to `out`, computed in float32."""
        y = x.float()  # [n, r, W, C]; x itself if it is float32
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)  # [n, r, W, 1]
        factor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        z = out if out.dtype == torch.float32 else y  # [n, r, W, C]
        torch.mul(y, factor, out=z)
        if scale is not None and shift is not None:
            torch.addcmul(shift, z, scale, out=z)
        F.silu(z, inplace=True)
        if z is not out:
            out.copy_(z)

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float() if x.dtype != torch.float32 else x.clone()  # [n, r, W, C]
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)  # [n, r, W, 1]
        return y.mul_(length.reciprocal_()).mul_(weight)
