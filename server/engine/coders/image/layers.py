"""The weights of a decoder or an encoder as a flat list of steps.

Taking the weights empties the diffusers modules, so that they exist only once in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...kernels.moments import GroupNorm
from ...kernels.reference import Kernels


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]


@dataclass(frozen=True)
class Conv:
    """A 3x3 convolution (2x2 for the folded upsample), its weight as the kernels want it."""

    weight: Tensor
    bias: Tensor  # [O]
    out_channels: int


@dataclass(frozen=True)
class Resnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), the x through `shortcut` where the channels change."""

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Linear | None


@dataclass(frozen=True)
class Attention:
    """x + softmax(q kᵀ / √C) v over all positions, with the output projection already inside v."""

    norm: GroupNorm
    query: Linear
    key: Linear
    value: Linear
    bias: Tensor  # [C]


@dataclass(frozen=True)
class Upsample:
    """Nearest 2x and the 3x3 convolution after it, as one 2x2 convolution to four phases."""

    conv: Conv


@dataclass(frozen=True)
class Downsample:
    """A 3x3 convolution of stride 2 that starts at the first pixel: its zero padding is right and below."""

    conv: Conv


DecoderStep = Resnet | Attention | Upsample
EncoderStep = Resnet | Attention | Downsample
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class DecoderWeights:
    post_quant: Linear | None
    conv_in: Conv
    steps: tuple[DecoderStep, ...]
    norm_out: GroupNorm
    conv_out: Conv
    dtype: torch.dtype
    device: torch.device

    @property
    def upsampling(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** sum(isinstance(step, Upsample) for step in self.steps))

    @property
    def full_size(self) -> range:
        """The steps, by index, whose output has the picture's full size."""
        last = max((i for i, step in enumerate(self.steps) if isinstance(step, Upsample)), default=len(self.steps))
        return range(last, len(self.steps))

    @classmethod
    def take(cls, vae: Any, kernels: Kernels) -> DecoderWeights:
        """Move the weights out of an AutoencoderKL whose structure is known. Its own decode no longer works after."""
        decoder = vae.decoder
        dtype, device = decoder.conv_in.weight.dtype, decoder.conv_in.weight.device
        return cls(
            post_quant=None if vae.post_quant_conv is None else take_linear(vae.post_quant_conv),
            conv_in=take_conv(decoder.conv_in, kernels),
            steps=tuple(_take_decoder_steps(decoder, kernels)),
            norm_out=take_norm(decoder.conv_norm_out),
            conv_out=take_conv(decoder.conv_out, kernels),
            dtype=dtype,
            device=device,
        )


@dataclass(frozen=True)
class EncoderWeights:
    conv_in: Conv
    steps: tuple[EncoderStep, ...]
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
    def take(cls, vae: Any, kernels: Kernels) -> EncoderWeights:
        """Move the weights out of an AutoencoderKL whose structure is known. Its own encode no longer works after."""
        encoder = vae.encoder
        dtype, device = encoder.conv_in.weight.dtype, encoder.conv_in.weight.device
        return cls(
            conv_in=take_conv(encoder.conv_in, kernels),
            steps=tuple(_take_encoder_steps(encoder, kernels)),
            norm_out=take_norm(encoder.conv_norm_out),
            conv_out=_take_conv_out(encoder.conv_out, vae.quant_conv, kernels),
            dtype=dtype,
            device=device,
        )


def take_steps(
    decoder: Any, take_resnet: Callable[[Any], Taken], take_upsample: Callable[[Any], Taken]
) -> Iterator[Taken | Attention]:
    """The mid block and the up blocks, in the order in which they run."""
    yield from take_mid_block(decoder.mid_block, take_resnet)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield take_resnet(resnet)
        for upsampler in block.upsamplers or ():
            yield take_upsample(upsampler)


def take_mid_block(block: Any, take_resnet: Callable[[Any], Taken]) -> Iterator[Taken | Attention]:
    first, *rest = block.resnets
    yield take_resnet(first)
    for attention, resnet in zip(block.attentions, rest, strict=True):
        if attention is not None:
            yield take_attention(attention)
        yield take_resnet(resnet)


def _take_decoder_steps(decoder: Any, kernels: Kernels) -> Iterator[DecoderStep]:
    def resnet(block: Any) -> DecoderStep:
        return take_resnet(block, kernels)

    def upsample(upsampler: Any) -> DecoderStep:
        return _take_upsample(upsampler, kernels)

    return take_steps(decoder, resnet, upsample)


def _take_upsample(upsampler: Any, kernels: Kernels) -> Upsample:
    weight, bias = take_weights(upsampler.conv)  # [O, I, 3, 3], [O]
    return Upsample(Conv(kernels.pack(fold_upsample(weight)), bias, len(bias)))


def fold_upsample(weight: Tensor) -> Tensor:  # [O, I, 3, 3] -> [4 O, I, 2, 2]
    """Taps of the 3x3 kernel that fall on the same pixel before the nearest-2x upsample are summed: 9 taps become 4.

    Phase 0 (even rows) sees rows i-1, i as taps 0, 1+2; phase 1 (odd rows) sees i, i+1 as taps 0+1, 2; columns alike.
    """
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    phases = torch.einsum("pak,qbl,oikl->pqoiab", fold, fold, weight.float())  # [2, 2, O, I, 2, 2]
    return phases.flatten(0, 2).to(weight.dtype)  # [4 O, I, 2, 2]


def take_resnet(resnet: Any, kernels: Kernels) -> Resnet:
    conv1, conv2 = take_conv(resnet.conv1, kernels), take_conv(resnet.conv2, kernels)
    shortcut = None if resnet.conv_shortcut is None else take_linear(resnet.conv_shortcut)
    return Resnet(take_norm(resnet.norm1), conv1, take_norm(resnet.norm2), conv2, shortcut)


def take_attention(attention: Any) -> Attention:
    """Two exact identities of softmax: the key's bias adds the same to every score of a row, so it is dropped; rows sum
    to one, so W_o(P v) + b_o = P(W_o W_v h) + (W_o b_v + b_o)."""
    query, key, value = take_linear(attention.to_q), take_linear(attention.to_k), take_linear(attention.to_v)
    out = take_linear(attention.to_out[0])
    dtype = query.weight.dtype
    weight = out.weight.double() @ value.weight.double()  # [C, C]
    bias = torch.zeros_like(weight[0]) if out.bias is None else out.bias.double()  # [C]
    if value.bias is not None:
        bias = bias + out.weight.double() @ value.bias.double()  # [C]
    folded = Linear(weight.to(dtype), None)
    return Attention(take_norm(attention.group_norm), query, Linear(key.weight, None), folded, bias.to(dtype))


def take_conv(conv: Any, kernels: Kernels) -> Conv:
    weight, bias = take_weights(conv)  # [O, I, 3, 3], [O]
    return Conv(kernels.pack(weight, conv.stride[0]), bias, weight.shape[0])


def take_linear(layer: Any) -> Linear:
    weight, bias = layer.weight.detach(), layer.bias  # [O, I] or [O, I, 1, 1]
    linear = Linear(weight.flatten(1).contiguous(), None if bias is None else bias.detach())
    empty(layer)
    return linear


def take_norm(norm: Any) -> GroupNorm:
    taken = GroupNorm(norm.num_groups, norm.eps, norm.weight.detach().float(), norm.bias.detach().float())
    empty(norm)
    return taken


def take_weights(conv: Any) -> tuple[Tensor, Tensor]:
    weight = conv.weight.detach()  # [O, I, k, k]
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach()  # [O]
    empty(conv)
    return weight, bias


def empty(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.new_empty(0)


def _take_encoder_steps(encoder: Any, kernels: Kernels) -> Iterator[EncoderStep]:
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
