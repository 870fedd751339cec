"""Take the weights of causal convolutions and of layers that change the size out of diffusers' modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import empty, fold_upsample
from .causal_encoder_layers import Beside, CausalDownsample
from .causal_layers import Before, CausalConv, CausalUpsample, Doubling


def take_causal_conv(conv: Any, kernels: CausalKernels, before: Before, *, replicates: bool = False) -> CausalConv:
    """Take a 3x3x3 convolution. before, replicates: as `CausalConv` says."""
    weight, bias = conv.weight.detach(), conv.bias.detach()  # [O, I, 3, 3, 3], [O]
    empty(conv)
    first = [weight[:, :, -1]] if before is Before.ZEROS else terms_of(weight.float().sum(2), weight.dtype)
    packed = kernels.planar.pack(torch.cat(first, 1).contiguous())  # [O, I, 3, 3] or [O, 2 I, 3, 3]
    return CausalConv(kernels.pack(weight), packed, bias, len(bias), before, replicates, len(first))


def take_causal_downsample(conv: Any, kernels: CausalKernels, beside: Beside) -> CausalDownsample:
    """Take a 3x3x3 convolution of stride 2 in space, and 1 or 2 in time. beside: what it reads beside each frame."""
    weight, bias, times = conv.weight.detach(), conv.bias.detach(), conv.stride[0]  # [O, I, 3, 3, 3], [O]
    empty(conv)
    packed = kernels.planar.pack(torch.cat(list(weight.unbind(2)), 1), stride=2)  # [O, 3 I, 3, 3]
    return CausalDownsample(packed, bias, times, len(bias), beside)


def take_causal_upsample(
    conv: Any, kernels: CausalKernels, *, times: int, replicates: bool, after: Doubling | None = None
) -> CausalUpsample:
    """Take a 3x3x3 convolution after nearest upsampling, which repeats the first frame before the video.

    times: 2 if the upsampling also doubles the frames. replicates, after: as `CausalUpsample` says.
    """
    weight, bias = conv.weight.detach(), conv.bias.detach()  # [O, I, 3, 3, 3], [O]
    empty(conv)
    in_time = fold_time(weight.float()) if times == 2 else [weight.float()]  # each [O, I, 2 or 3, 3, 3]
    phases = torch.cat([fold_upsample(torch.cat(list(phase.unbind(2)), 1)) for phase in in_time])  # [T 4 O, k I, 2, 2]
    first = terms_of(fold_upsample(weight.float().sum(2)), weight.dtype)  # each [4 O, I, 2, 2]
    # The convolution adds the bias to every phase. Adding it afterwards would round once more.
    return CausalUpsample(
        weight=kernels.planar.pack(phases.to(weight.dtype)),
        first=kernels.planar.pack(torch.cat(first, 1)),
        first_terms=len(first),
        bias=bias.repeat(4 * times),
        taps=in_time[0].shape[2],
        times=times,
        out_channels=len(bias),
        replicates=replicates,
        after=after,
    )


def terms_of(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of a dtype whose sum is a float32 weight: one for float32, two for half precision.

    A sum of taps has more digits than a half precision number. Rounding it would cost half a decibel.
    """
    rounded = weight.to(dtype)
    return [rounded] if dtype is torch.float32 else [rounded, (weight - rounded.float()).to(dtype)]


def fold_time(weight: Tensor) -> list[Tensor]:  # [O, I, 3, 3, 3] -> two of [O, I, 2, 3, 3]
    """Fold a doubling of frames into the causal convolution that follows it. Return one kernel for each copy.

    After the doubling, the first copy of frame k reads the frames k-1, k-1, k and the second copy k-1, k, k, so two
    taps are enough. The first frame of a video is not doubled; all of its taps read itself.
    """
    first, middle, last = weight.unbind(2)  # [O, I, 3, 3]
    return [torch.stack([first + middle, last], 2), torch.stack([first, middle + last], 2)]  # [O, I, 2, 3, 3]
