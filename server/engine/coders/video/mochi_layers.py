"""Mochi: check that the structure is known, and take the weights.

Its norms span one frame. Rows, columns and frames around the video repeat its edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import Linear, take_linear, take_norm
from ..image.structure import norm_reasons
from .causal_layers import Before, Block, CausalConv, CausalDecoder, Expand, Resnet, Span, SpanNorm, Step
from .causal_structure import class_reasons, conv_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv

NAME = "AutoencoderKLMochi"
PREFIX = "Mochi"


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_reasons(vae), None)


def _reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    parts = {"nonlinearity", "conv_in", "block_in", "up_blocks", "block_out", "proj_out"}
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder3D", parts)
    yield from silu_reasons("nonlinearity", decoder.nonlinearity)
    yield from conv_reasons("conv_in", decoder.conv_in, (1, 1, 1))
    for name, block in (("block_in", decoder.block_in), ("block_out", decoder.block_out)):
        yield from class_reasons(name, block, f"{PREFIX}MidBlock3D", {"resnets", "norms", "attentions"})
        yield from _resnets(name, block.resnets)
        if any(attention is not None for attention in block.attentions):
            yield f"{name} has attention."
    for index, block in enumerate(decoder.up_blocks):
        name = f"up_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}UpBlock3D", {"resnets", "proj"})
        yield from _resnets(name, block.resnets)
        if block.spatial_expansion != 2:
            yield f"{name} makes {block.spatial_expansion} rows of one."
    if vae.use_framewise_decoding:
        yield "It decodes the frames of a video independently of each other."
    yield from weights_reasons(decoder)


def _resnets(name: str, resnets: Any) -> Iterator[str]:
    for index, resnet in enumerate(resnets):
        yield from _resnet(f"{name}.resnets.{index}", resnet)


def _resnet(name: str, resnet: Any) -> Iterator[str]:
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "conv2"}
    yield from class_reasons(name, resnet, f"{PREFIX}ResnetBlock3D", parts)
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    for part in ("norm1", "norm2"):
        norm = resnet.get_submodule(part)
        yield from class_reasons(f"{name}.{part}", norm, f"{PREFIX}ChunkedGroupNorm3D", {"norm_layer"})
        if not isinstance(norm.norm_layer, nn.GroupNorm):
            yield f"{name}.{part}.norm_layer is a {type(norm.norm_layer).__name__}, not a GroupNorm."
        else:
            yield from norm_reasons(f"{name}.{part}.norm_layer", norm.norm_layer)
    for part in ("conv1", "conv2"):
        conv = resnet.get_submodule(part)
        yield from class_reasons(f"{name}.{part}", conv, "CogVideoXCausalConv3d", {"conv"})
        yield from conv_reasons(f"{name}.{part}.conv", conv.conv, (3, 3, 3))
        if conv.pad_mode != "replicate" or tuple(conv.time_causal_padding) != (1, 1, 1, 1, 2, 0):
            yield f"{name}.{part} pads in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=None,
        conv_in=take_linear(decoder.conv_in),
        blocks=tuple(Block((step,)) for step in _take_steps(decoder, kernels)),
        norm_out=None,
        conv_out=take_linear(decoder.proj_out),
        dropped=vae.temporal_compression_ratio - 1 if vae.drop_last_temporal_frames else 0,
        dtype=dtype,
        device=device,
    )


def _take_steps(decoder: Any, kernels: CausalKernels) -> Iterator[Step]:
    for block in (decoder.block_in, *decoder.up_blocks, decoder.block_out):
        for resnet in block.resnets:
            conv1, conv2 = _take_conv(resnet.conv1, kernels), _take_conv(resnet.conv2, kernels)
            yield Resnet(_take_norm(resnet.norm1), conv1, _take_norm(resnet.norm2), conv2, None)
        if block in decoder.up_blocks:
            yield _take_expand(block)


def _take_expand(block: Any) -> Expand:
    """Take the linear layer after which channels are unfolded, in another order: diffusers' is (o, s, p, q)."""
    linear, times, rows = take_linear(block.proj), block.temporal_expansion, block.spatial_expansion
    assert linear.bias is not None
    phases = times * rows * rows
    weight = linear.weight.view(-1, phases, linear.weight.shape[1])  # [O, T 2 2, I]
    weight = weight.transpose(0, 1).flatten(0, 1).contiguous()  # [T 2 2 O, I]
    bias = linear.bias.view(-1, phases).T.flatten().contiguous()  # [T 2 2 O]
    return Expand(Linear(weight, bias), times, len(bias) // phases)


def _take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    return take_causal_conv(conv.conv, kernels, Before.FIRST_FRAME, replicates=True)


def _take_norm(norm: Any) -> SpanNorm:
    return SpanNorm(take_norm(norm.norm_layer), Span.FRAME)
