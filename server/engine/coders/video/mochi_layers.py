"""Mochi: check that the structure is known, and take the weights.

Its norms span one frame. Rows, columns and frames around the video repeat its edges. The encoder attends to the frames
so far at each position; its first layer also takes sines and cosines of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import MochiVaeAttnProcessor2_0
from diffusers.models.normalization import LpNorm
from torch import Tensor, nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import Linear, empty, take_linear, take_norm
from ..image.structure import norm_reasons
from .causal_encoder_layers import CausalEncoder, Chunks, Contract, EncoderBlock, EncoderStep, FrameAttention
from .causal_layers import Before, Block, CausalConv, CausalDecoder, Expand, Resnet, Span, SpanNorm, Step
from .causal_structure import class_reasons, conv_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv

NAME = "AutoencoderKLMochi"
PREFIX = "Mochi"


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    parts = {"nonlinearity", "conv_in", "block_in", "up_blocks", "block_out", "proj_out"}
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder3D", parts)
    yield from silu_reasons("nonlinearity", decoder.nonlinearity)
    yield from conv_reasons("conv_in", decoder.conv_in, (1, 1, 1))
    for name, block in (("block_in", decoder.block_in), ("block_out", decoder.block_out)):
        yield from _mid_block(name, block)
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


def _encoder_reasons(vae: Any) -> Iterator[str]:
    encoder = vae.encoder
    ends = {"nonlinearity", "fourier_features", "proj_in", "norm_out", "proj_out"}
    yield from class_reasons("encoder", encoder, f"{PREFIX}Encoder3D", ends | {"block_in", "down_blocks", "block_out"})
    yield from silu_reasons("nonlinearity", encoder.nonlinearity)
    yield from class_reasons("fourier_features", encoder.fourier_features, "FourierFeatures", set())
    for part in ("proj_in", "proj_out"):
        yield from _linear(part, encoder.get_submodule(part))
    yield from _norm("norm_out", encoder.norm_out)
    for name, block in (("block_in", encoder.block_in), ("block_out", encoder.block_out)):
        yield from _mid_block(name, block)
        yield from _attentions(name, block)
    for index, block in enumerate(encoder.down_blocks):
        name = f"down_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}DownBlock3D", {"conv_in", "resnets", "norms", "attentions"})
        yield from _block_conv(f"{name}.conv_in", block)
        yield from _resnets(name, block.resnets)
        yield from _attentions(name, block)
    if vae.use_framewise_encoding:
        yield "It encodes the frames of a video independently of each other."
    yield from weights_reasons(encoder)


def _mid_block(name: str, block: Any) -> Iterator[str]:
    yield from class_reasons(name, block, f"{PREFIX}MidBlock3D", {"resnets", "norms", "attentions"})
    yield from _resnets(name, block.resnets)


def _block_conv(name: str, block: Any) -> Iterator[str]:
    """Check the convolution at the start of a block, whose kernel is as large as its stride."""
    times = block.temporal_expansion
    if block.spatial_expansion != 2:
        yield f"{name} makes one row of {block.spatial_expansion}."
    yield from class_reasons(name, block.conv_in, "CogVideoXCausalConv3d", {"conv"})
    yield from conv_reasons(f"{name}.conv", block.conv_in.conv, (times, 2, 2), stride=(times, 2, 2))
    yield from _padding(name, block.conv_in, (0, 0, 0, 0, times - 1, 0))


def _attentions(name: str, block: Any) -> Iterator[str]:
    for index, (norm, attention) in enumerate(zip(block.norms, block.attentions, strict=True)):
        if attention is not None:
            yield from _norm(f"{name}.norms.{index}", norm)
            yield from _attention(f"{name}.attentions.{index}", attention)


def _attention(name: str, attention: Any) -> Iterator[str]:
    parts = {"norm_q", "norm_k", "to_q", "to_k", "to_v", "to_out"}
    yield from class_reasons(name, attention, "Attention", parts)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.{part}", attention.get_submodule(part))
    lengths, projections = (attention.norm_q, attention.norm_k), (attention.to_q, attention.to_k, attention.to_v)
    known = (
        type(attention.processor) is MochiVaeAttnProcessor2_0
        and attention.is_causal
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and all(type(norm) is LpNorm and (norm.p, norm.dim) == (2, -1) for norm in lengths)
        and attention.norm_q.eps == attention.norm_k.eps
        and all(layer.weight.shape == attention.to_q.weight.T.shape for layer in (*projections, attention.to_out[0]))
        and not (attention.training and attention.to_out[1].p)
    )
    if not known:
        yield f"{name} is not a causal attention whose queries and keys are divided by their lengths."


def _linear(name: str, layer: Any) -> Iterator[str]:
    if type(layer) is not nn.Linear:
        yield f"{name} is a {type(layer).__name__}, not a linear layer."


def _resnets(name: str, resnets: Any) -> Iterator[str]:
    for index, resnet in enumerate(resnets):
        yield from _resnet(f"{name}.resnets.{index}", resnet)


def _resnet(name: str, resnet: Any) -> Iterator[str]:
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "conv2"}
    yield from class_reasons(name, resnet, f"{PREFIX}ResnetBlock3D", parts)
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    for part in ("norm1", "norm2"):
        yield from _norm(f"{name}.{part}", resnet.get_submodule(part))
    for part in ("conv1", "conv2"):
        conv = resnet.get_submodule(part)
        yield from class_reasons(f"{name}.{part}", conv, "CogVideoXCausalConv3d", {"conv"})
        yield from conv_reasons(f"{name}.{part}.conv", conv.conv, (3, 3, 3))
        yield from _padding(f"{name}.{part}", conv, (1, 1, 1, 1, 2, 0))


def _padding(name: str, conv: Any, padding: tuple[int, ...]) -> Iterator[str]:
    """Check what a convolution repeats: columns left and right, rows above and below, frames before and after."""
    if conv.pad_mode != "replicate" or tuple(conv.time_causal_padding) != padding:
        yield f"{name} pads in an unknown way."


def _norm(name: str, norm: Any) -> Iterator[str]:
    yield from class_reasons(name, norm, f"{PREFIX}ChunkedGroupNorm3D", {"norm_layer"})
    if not isinstance(norm.norm_layer, nn.GroupNorm):
        yield f"{name}.norm_layer is a {type(norm.norm_layer).__name__}, not a GroupNorm."
    else:
        yield from norm_reasons(f"{name}.norm_layer", norm.norm_layer)


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
            yield _take_resnet(resnet, kernels)
        if block in decoder.up_blocks:
            yield _take_expand(block)


def take_encoder(vae: Any, kernels: CausalKernels) -> CausalEncoder:
    """Move the weights out of a VAE whose structure is known. Its own encode no longer works afterwards."""
    encoder = vae.encoder
    weight = encoder.proj_in.weight
    dtype, device, in_channels = weight.dtype, weight.device, weight.shape[1]
    return CausalEncoder(
        patch=1,
        conv_in=take_linear(encoder.proj_in),
        in_channels=in_channels,
        blocks=tuple(EncoderBlock((step,)) for step in _take_encoder_steps(encoder, kernels)),
        norm_out=_take_norm(encoder.norm_out),
        conv_out=take_linear(encoder.proj_out),
        averages_output=False,
        quant=None,
        dtype=dtype,
        device=device,
        # Convolutions ignore frames at the end that fill no step of their stride.
        only_multiples_of=vae.temporal_compression_ratio,
        chunks=Chunks(vae.temporal_compression_ratio, first_takes_rest=False),
        waves=_waves(encoder.fourier_features, device),
    )


def _waves(features: Any, device: torch.device) -> Tensor:  # [K]
    powers = torch.arange(features.start, features.stop, features.step, dtype=torch.float32, device=device)  # [K]
    return torch.pow(2.0, powers) * (2 * math.pi)


def _take_encoder_steps(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderStep]:
    for block in (encoder.block_in, *encoder.down_blocks, encoder.block_out):
        if block in encoder.down_blocks:
            yield _take_contract(block)
        for resnet, norm, attention in zip(block.resnets, block.norms, block.attentions, strict=True):
            yield _take_resnet(resnet, kernels)
            if attention is not None:
                yield _take_attention(norm, attention)


def _take_contract(block: Any) -> Contract:
    conv = block.conv_in.conv
    weight, bias = conv.weight.detach(), conv.bias.detach()  # [O, I, T, 2, 2], [O]
    empty(conv)
    weight = weight.permute(0, 2, 3, 4, 1).flatten(1).contiguous()  # [O, T 2 2 I]
    return Contract(Linear(weight, bias), block.temporal_expansion, len(bias))


def _take_attention(norm: Any, attention: Any) -> FrameAttention:
    parts = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    query, key, value, out = map(take_linear, parts)
    return FrameAttention(_take_norm(norm), query, key, value, out, attention.heads, attention.norm_q.eps)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    conv1, conv2 = _take_conv(resnet.conv1, kernels), _take_conv(resnet.conv2, kernels)
    return Resnet(_take_norm(resnet.norm1), conv1, _take_norm(resnet.norm2), conv2, None)


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
