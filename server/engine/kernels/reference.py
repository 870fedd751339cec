"""The tensor operations that the exact coders' passes consist of, in plain torch, for any device.

`cpu.py` and `cuda.py` override the operations that they can do faster. Activations are contiguous `[B, H, W, C]`. The
input of a convolution includes its halo, one row above and one below; the convolution itself pads the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Affine, GroupNorm, Moments

TAPS = 3  # the frames that a convolution over time reads
SCORE_BYTES = 8  # what `attend` may hold for each query and key: a score and its weight, in float32


class Kernels:
    """Kernels in plain torch. Subclasses return the same values within rounding.

    in_3d: `conv_frames` is a 3-D convolution, not a 2-D one of frames side by side. It must not change once weights
        were packed.
    note: why these are not the fastest kernels for such a device, a sentence for `GET /models`; None if they are.
    """

    in_3d = False

    def __init__(self, note: str | None = None) -> None:
        self.note = note

    def pack(self, weight: Tensor, stride: int = 1) -> Tensor:  # [O, I, k, k]
        """Return the weight of a convolution in the layout that `conv` expects. stride: its stride."""
        return weight.contiguous(memory_format=torch.channels_last)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: int = 1, stride: int = 1) -> Tensor:
        """Convolve x `[B, n + 2, W, I]` to `[B, n, W, O]` (for a 3x3 weight and a stride of 1).

        weight: as `pack` returns it. columns: how many columns of zeros to add on the left and on the right.
        """
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, (0, columns))  # [B, O, n, W]
        return y.permute(0, 2, 3, 1).contiguous()  # [B, n, W, O], already in this order

    def pack_frames(self, weight: Tensor) -> Tensor:  # [O, I, 3, 3, 3]
        """Return a weight as `conv_frames` expects it: in 3-D, or with the taps side by side, [O, 3 I, 3, 3]."""
        if self.in_3d:
            return weight.contiguous(memory_format=torch.channels_last_3d)
        return self.pack(torch.cat(list(weight.unbind(2)), 1))

    def conv_frames(
        self, window: Tensor, weight: Tensor, bias: Tensor, columns: int
    ) -> Tensor:  # [n + 2, r + 2, W + 2 - 2 columns, I] -> [n, r, W, O]
        """Convolve each three frames that follow one another. columns: as for `conv`."""
        if not self.in_3d:
            return self.conv(self.side_by_side(window, len(window) - TAPS + 1, TAPS), weight, bias, columns)
        y = F.conv3d(window.permute(3, 0, 1, 2)[None], weight, bias, padding=(0, 0, columns))  # [1, O, n, r, W]
        return y[0].permute(1, 2, 3, 0).contiguous()  # [n, r, W, O], already in this order

    def side_by_side(
        self, window: Tensor, frames: int, taps: int
    ) -> Tensor:  # [n + taps - 1, r, W, C] -> [n, r, W, taps C]
        """Return every frame with those before it, oldest first, as channels."""
        channels = window.shape[-1]
        y = window.new_empty(frames, *window.shape[1:3], taps * channels)  # [n, r, W, taps C]
        for tap in range(taps):
            y[..., tap * channels : (tap + 1) * channels] = window[tap : tap + frames]
        return y

    def add_conv_(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, unit: int) -> Moments:
        """Add conv(x `[B, n + 2, W, I]`) + bias to total `[B, n, W, O]` in place.

        Return the moments of the new total.
        """
        total += self.conv(x, weight, bias)  # [B, n, W, O]
        return self.moments(total, unit)

    def moments(self, x: Tensor, unit: int) -> Moments:  # [B, n, W, C]
        """Return the moments of x, here in one part.

        unit: for kernels whose parts must not depend on n, how many rows form a part.
        """
        variance, mean = torch.var_mean(x.float(), (1, 2), correction=0)  # [B, C]
        pixels = x.shape[1] * x.shape[2]
        return Moments(mean.new_full((1,), pixels), mean[None], variance[None] * pixels)

    def affine(self, norm: GroupNorm, parts: Sequence[Moments], offset: Tensor | None = None) -> Affine:
        """Merge the moments of all parts as `GroupNorm.affine` says."""
        return norm.affine(parts, offset)

    def normalize(self, x: Tensor, affine: Affine, out: Tensor, *, silu: bool) -> None:
        """Write scale * x + shift to out `[B, n, W, C]`, after SiLU if `silu` is true. Computed in float32."""
        y = torch.addcmul(affine.shift[:, None, None], x.float(), affine.scale[:, None, None])  # [B, n, W, C]
        out.copy_(F.silu(y) if silu else y)

    def interleave(self, phases: Tensor, bias: Tensor, unit: int) -> tuple[Tensor, Moments]:  # [B, n + 1, W + 1, 4 C]
        """Return the upsampled activation `[B, 2 n, 2 W, C]` and its moments.

        Its pixel (2i + p, 2j + q) is the pixel (i + p, j + q) of phase (p, q), plus bias.
        """
        batch, n, width, channels = (phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1, phases.shape[3] // 4)
        out = phases.new_empty(batch, n, 2, width, 2, channels)  # [B, n, 2, W, 2, C]
        for phase, part in enumerate(torch.split(phases, channels, dim=3)):  # [B, n + 1, W + 1, C]
            p, q = divmod(phase, 2)
            torch.add(part[:, p : n + p, q : width + q], bias, out=out[:, :, p, :, q])
        upsampled = out.view(batch, 2 * n, 2 * width, channels)  # [B, 2 n, 2 W, C]
        return upsampled, self.moments(upsampled, unit)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, t, C], [B, N, C] twice -> [B, t, C]
        """Return softmax(q kᵀ / √C) v for a chunk of t queries and all N keys and values, with scores in float32."""
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]  # [B, t, C]
