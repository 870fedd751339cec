"""The encoder's weights as a flat list of steps. Taking them empties the diffusers modules, so that they exist once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.exact.kernels import Kernels
from server.engine.exact.moments import GroupNorm
from server.engine.exact.network import (
    Attention,
    Conv,
    Downsample,
    Linear,
    Resnet,
    take_conv,
    take_linear,
    take_mid_block,
    take_norm,
    take_resnet,
    take_weights,
)

Step = Resnet | Attention | Downsample


@dataclass(frozen=True)
class Network:
    conv_in: Conv
    steps: tuple[Step, ...]
    norm_out: GroupNorm
    conv_out: Conv  # with the quant_conv after it inside
    dtype: torch.dtype
    device: torch.device

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** sum(isinstance(step, Downsample) for step in self.steps))

    @property
    def full_size(self) -> range:
        """The steps, by index, whose output has the picture's full size; none where the latents have it too."""
        return range(next((i for i, step in enumerate(self.steps) if isinstance(step, Downsample)), 0))

    @classmethod
    def take(cls, vae: Any, kernels: Kernels) -> Network:
        """Move the weights out of an AutoencoderKL whose structure is known. Its own encode no longer works after."""
        encoder = vae.encoder
        dtype, device = encoder.conv_in.weight.dtype, encoder.conv_in.weight.device
        return cls(
            conv_in=take_conv(encoder.conv_in, kernels),
            steps=tuple(_take_steps(encoder, kernels)),
            norm_out=take_norm(encoder.conv_norm_out),
            conv_out=_take_conv_out(encoder.conv_out, vae.quant_conv, kernels),
            dtype=dtype,
            device=device,
        )


def _take_steps(encoder: Any, kernels: Kernels) -> Iterator[Step]:
    """The down blocks and the mid block, in the order in which they run."""
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield take_resnet(resnet, kernels)
        for downsampler in block.downsamplers or ():
            yield Downsample(take_conv(downsampler.conv, kernels))
    yield from take_mid_block(encoder.mid_block, lambda resnet: take_resnet(resnet, kernels))


def _take_conv_out(conv: Any, quant_conv: Any, kernels: Kernels) -> Conv:
    weight, bias = take_weights(conv)  # [I, C, 3, 3], [I]
    if quant_conv is not None:
        weight, bias = fold_quant(weight, bias, take_linear(quant_conv))  # [O, C, 3, 3], [O]
    return Conv(kernels.pack(weight), bias, weight.shape[0])


def fold_quant(weight: Tensor, bias: Tensor, quant: Linear) -> tuple[Tensor, Tensor]:  # [I, C, 3, 3], [I], [O, I]
    """W_q (W * x + b) + b_q = (W_q W) * x + (W_q b + b_q): one convolution, and one rounding less."""
    mixing, dtype = quant.weight.double(), weight.dtype  # [O, I]
    mixed = torch.einsum("oi,ickl->ockl", mixing, weight.double())  # [O, C, 3, 3]
    constant = mixing @ bias.double()  # [O]
    if quant.bias is not None:
        constant = constant + quant.bias.double()  # [O]
    return mixed.to(dtype), constant.to(dtype)
