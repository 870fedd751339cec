"""The weights of a decoder or an encoder, as a flat list of steps.

The `take_*` functions move weights out of diffusers modules and leave the modules empty, so that every weight exists
only once in memory.
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
    """A linear layer, or a 1x1 convolution."""

    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]


@dataclass(frozen=True)
class Conv:
    """A 3x3 convolution, or the 2x2 convolution of an `Upsample`. weight: as `Kernels.pack` returns it."""

    weight: Tensor
    bias: Tensor  # [O]
    out_channels: int


@dataclass(frozen=True)
class Resnet:
    """A residual block: x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    `shortcut`, if any, is applied to the first x.
    """

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Linear | None


@dataclass(frozen=True)
class Attention:
    """Self-attention over all positions: x + softmax(q kᵀ / √C) v + bias. `value` includes the output projection."""

    norm: GroupNorm
    query: Linear
    key: Linear
    value: Linear
    bias: Tensor  # [C]


@dataclass(frozen=True)
class Upsample:
    """A nearest-neighbour 2x upsample and its 3x3 convolution, folded into one 2x2 convolution to four phases."""

    conv: Conv


@dataclass(frozen=True)
class Downsample:
    """A 3x3 convolution of stride 2. Its zero padding is one column on the right and one row at the bottom."""

    conv: Conv


DecoderStep = Resnet | Attention | Upsample
EncoderStep = Resnet | Attention | Downsample
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of an AutoencoderKL's decoder, in the order in which they are used."""

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
        """The indices of the steps whose output has the size of the image: the last upsample and all after it."""
        last = max((i for i, step in enumerate(self.steps) if isinstance(step, Upsample)), default=len(self.steps))
        return range(last, len(self.steps))

    @classmethod
    def take(cls, vae: Any, kernels: Kernels) -> DecoderWeights:
        """Take the weights out of an AutoencoderKL for which `decoder_reason` is None.

        `vae.decode` no longer works afterwards.
        """
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
    """The weights of an AutoencoderKL's encoder, in the order in which they are used."""

    conv_in: Conv
    steps: tuple[EncoderStep, ...]
    norm_out: GroupNorm
    conv_out: Conv  # the quant_conv that follows is folded into it
    dtype: torch.dtype
    device: torch.device

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** sum(isinstance(step, Downsample) for step in self.steps))

    @property
    def full_size(self) -> range:
        """The indices of the steps before the first downsample: their output has the size of the image.

        Empty for an encoder without a downsample.
        """
        return range(next((i for i, step in enumerate(self.steps) if isinstance(step, Downsample)), 0))

    @classmethod
    def take(cls, vae: Any, kernels: Kernels) -> EncoderWeights:
        """Take the weights out of an AutoencoderKL for which `encoder_reason` is None.

        `vae.encode` no longer works afterwards.
        """
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
    """Yield the steps of a decoder's mid block and up blocks, in the order in which they run."""
    yield from take_mid_block(decoder.mid_block, take_resnet)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield take_resnet(resnet)
        for upsampler in block.upsamplers or ():
            yield take_upsample(upsampler)


def take_mid_block(block: Any, take_resnet: Callable[[Any], Taken]) -> Iterator[Taken | Attention]:
    """Yield the steps of a mid block: a resnet, then an attention (if there is one) and a resnet, and so on."""
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
    """Fold a nearest-neighbour 2x upsample into the 3x3 convolution that follows it.

    After the upsample, neighbouring taps of the kernel read copies of the same pixel. Summing those taps leaves 4 of
    the 9, different ones for each of the four phases (even or odd row, even or odd column) of the output. In an even
    row, tap 0 reads the input row i-1, and taps 1 and 2 read row i. In an odd row, taps 0 and 1 read row i, and tap 2
    reads row i+1. The same holds for columns.
    """
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    phases = torch.einsum("pak,qbl,oikl->pqoiab", fold, fold, weight.float())  # [2, 2, O, I, 2, 2]
    return phases.flatten(0, 2).to(weight.dtype)  # [4 O, I, 2, 2]


def take_resnet(resnet: Any, kernels: Kernels) -> Resnet:
    """Take the weights out of a `ResnetBlock2D`."""
    conv1, conv2 = take_conv(resnet.conv1, kernels), take_conv(resnet.conv2, kernels)
    shortcut = None if resnet.conv_shortcut is None else take_linear(resnet.conv_shortcut)
    return Resnet(take_norm(resnet.norm1), conv1, take_norm(resnet.norm2), conv2, shortcut)


def take_attention(attention: Any) -> Attention:
    """Take the weights out of an `Attention`, simplified by two exact identities of softmax.

    The key's bias adds the same number to all scores of one query, which softmax ignores, so it is dropped.
    The probabilities P of one query sum to one, so W_o (P (W_v h + b_v)) + b_o = P (W_o W_v h) + (W_o b_v + b_o): the
    output projection is folded into the value's weight, and both biases become one.
    """
    query, key, value = take_linear(attention.to_q), take_linear(attention.to_k), take_linear(attention.to_v)
    out = take_linear(attention.to_out[0])
    weight = precise(out.weight) @ precise(value.weight)  # [C, C]
    bias = torch.zeros_like(weight[0]) if out.bias is None else precise(out.bias)  # [C]
    if value.bias is not None:
        bias = bias + precise(out.weight) @ precise(value.bias)  # [C]
    folded = Linear(rounded(weight, query.weight), None)
    return Attention(
        take_norm(attention.group_norm), query, Linear(key.weight, None), folded, rounded(bias, query.weight)
    )


def take_conv(conv: Any, kernels: Kernels) -> Conv:
    """Take the weights out of a `Conv2d` and pack them for the kernels."""
    weight, bias = take_weights(conv)  # [O, I, 3, 3], [O]
    return Conv(kernels.pack(weight, conv.stride[0]), bias, weight.shape[0])


def take_linear(layer: Any) -> Linear:
    """Take the weights out of a `Linear`, or of a convolution with a kernel of one pixel."""
    weight, bias = layer.weight.detach(), layer.bias  # [O, I] or [O, I, 1, 1]
    linear = Linear(weight.flatten(1).contiguous(), None if bias is None else bias.detach())
    empty(layer)
    return linear


def take_norm(norm: Any) -> GroupNorm:
    """Take the weights out of an affine `GroupNorm`, in float32."""
    taken = GroupNorm(norm.num_groups, norm.eps, norm.weight.detach().float(), norm.bias.detach().float())
    empty(norm)
    return taken


def take_weights(conv: Any) -> tuple[Tensor, Tensor]:
    """Take the weight `[O, I, k, k]` and the bias `[O]` out of a convolution. A missing bias becomes zeros."""
    weight = conv.weight.detach()  # [O, I, k, k]
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach()  # [O]
    empty(conv)
    return weight, bias


def precise(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its own device has no float64, as Apple GPUs do not."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def rounded(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of another one. It is cast first: some devices have no float64."""
    return x.to(like.dtype).to(like.device)


def empty(module: nn.Module) -> None:
    """Replace the module's own parameters, not those of its children, with empty tensors."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.new_empty(0)


def _take_encoder_steps(encoder: Any, kernels: Kernels) -> Iterator[EncoderStep]:
    """Yield the steps of the down blocks and the mid block, in the order in which they run."""
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
    """Fold a 1x1 convolution into the convolution before it: W_q (W * x + b) + b_q = (W_q W) * x + (W_q b + b_q).

    This saves one convolution and the rounding of its input.
    """
    mixing = precise(quant.weight)  # [O, I]
    mixed = torch.einsum("oi,ickl->ockl", mixing, precise(weight))  # [O, C, 3, 3]
    constant = mixing @ precise(bias)  # [O]
    if quant.bias is not None:
        constant = constant + precise(quant.bias)  # [O]
    return rounded(mixed, weight), rounded(constant, weight)
