"""The handful of tensor operations the passes are written in, in plain torch, right on any device.

Activations are `[B, H, W, C]`, contiguous. A convolution's input carries its halo: one row above and one below; the
columns' zero padding is the convolution's own. `cpu.py` and `cuda.py` override what they can do faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Affine, GroupNorm, Moments


class Kernels:
    def pack(self, weight: Tensor, stride: int = 1) -> Tensor:  # [O, I, k, k]
        """A weight as `conv` wants it, for the stride that it is called with."""
        return weight.contiguous(memory_format=torch.channels_last)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: int = 1, stride: int = 1) -> Tensor:
        """x [B, n + 2, W, I] -> [B, n, W, O]; `columns` of zeros are added left and right."""
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, (0, columns))  # [B, O, n, W]
        return y.permute(0, 2, 3, 1).contiguous()  # [B, n, W, O], already in this order

    def add_conv_(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, unit: int) -> Moments:
        """total [B, n, W, O] += conv(x [B, n + 2, W, I]) + bias; the moments of the new total."""
        total += self.conv(x, weight, bias)  # [B, n, W, O]
        return self.moments(total, unit)

    def moments(self, x: Tensor, unit: int) -> Moments:  # [B, n, W, C]
        """`unit` is how many rows to take together where the partition shall not depend on n; here it may."""
        variance, mean = torch.var_mean(x.float(), (1, 2), correction=0)  # [B, C]
        pixels = x.shape[1] * x.shape[2]
        return Moments(mean.new_full((1,), pixels), mean[None], variance[None] * pixels)

    def affine(self, norm: GroupNorm, parts: Sequence[Moments], offset: Tensor | None = None) -> Affine:
        return norm.affine(parts, offset)

    def normalize(self, x: Tensor, affine: Affine, out: Tensor, *, silu: bool) -> None:
        """out [B, n, W, C] = scale x + shift, through SiLU if asked; computed in float32."""
        y = torch.addcmul(affine.shift[:, None, None], x.float(), affine.scale[:, None, None])  # [B, n, W, C]
        out.copy_(F.silu(y) if silu else y)

    def interleave(self, phases: Tensor, bias: Tensor, unit: int) -> tuple[Tensor, Moments]:  # [B, n + 1, W + 1, 4 C]
        """Pixel (2i + p, 2j + q) is phase (p, q) at (i + p, j + q), plus bias; -> [B, 2 n, 2 W, C] and its moments."""
        batch, n, width, channels = (phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1, phases.shape[3] // 4)
        out = phases.new_empty(batch, n, 2, width, 2, channels)  # [B, n, 2, W, 2, C]
        for phase, part in enumerate(torch.split(phases, channels, dim=3)):  # [B, n + 1, W + 1, C]
            p, q = divmod(phase, 2)
            torch.add(part[:, p : n + p, q : width + q], bias, out=out[:, :, p, :, q])
        picture = out.view(batch, 2 * n, 2 * width, channels)  # [B, 2 n, 2 W, C]
        return picture, self.moments(picture, unit)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, t, C], [B, N, C] twice -> [B, t, C]
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(1, 2))  # [B, t, N]
        return torch.softmax(scores, -1) @ value  # [B, t, C]
