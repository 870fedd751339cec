"""Wan 2.1, Wan 2.2, Qwen-Image and Qwen-Image 2.1: check that the structure is known, and take the weights.

The classes have the same layers under different names. Qwen-Image 2.1 takes only images: its convolutions are 2-D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import Linear, empty, fold_upsample, precise, rounded, take_linear, take_weights
from .causal_encoder_layers import Average, CausalEncoder, Downsample, EncoderBlock, EncoderStep
from .causal_layers import Attention, Block, CausalConv, CausalDecoder, Duplicate, PixelNorm, Resnet, Step, Upsample
from .causal_structure import class_reasons, conv_reasons, norm_reasons, silu_reasons, weights_reasons

PREFIXES = {"AutoencoderKLWan": "Wan", "AutoencoderKLQwenImage": "QwenImage", "AutoencoderKLQwenImage21": "QwenImage21"}
"""The classes that are known, and what the names of their layers begin with."""
ENDS = {"nonlinearity", "conv_in", "mid_block", "norm_out", "conv_out"}
CHUNK_FRAMES = 4  # how many frames diffusers encodes together, after the first one


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    prefix, decoder = PREFIXES[type(vae).__name__], vae.decoder
    yield from class_reasons("decoder", decoder, f"{prefix}Decoder3d", ENDS | {"up_blocks"})
    yield from _causal("post_quant_conv", vae.post_quant_conv, prefix, 1)
    yield from _ends(decoder, prefix)
    for index, block in enumerate(decoder.up_blocks):
        yield from _up_block(f"up_blocks.{index}", block, prefix)
    yield from weights_reasons(decoder)


def _encoder_reasons(vae: Any) -> Iterator[str]:
    prefix, encoder = PREFIXES[type(vae).__name__], vae.encoder
    yield from class_reasons("encoder", encoder, f"{prefix}Encoder3d", ENDS | {"down_blocks"})
    yield from _causal("quant_conv", vae.quant_conv, prefix, 1)
    yield from _ends(encoder, prefix)
    for index, block in enumerate(encoder.down_blocks):
        yield from _down_block(f"down_blocks.{index}", block, prefix)
    halvings = [module for module in encoder.modules() if getattr(module, "mode", None) == "downsample3d"]
    if prefix != "QwenImage21" and CHUNK_FRAMES % 2 ** len(halvings):
        yield f"It halves the frames {len(halvings)} times, but diffusers encodes {CHUNK_FRAMES} frames at a time."
    yield from weights_reasons(encoder)


def _ends(part: Any, prefix: str) -> Iterator[str]:
    """Check a decoder or encoder except its up or down blocks."""
    yield from _causal("conv_in", part.conv_in, prefix, 3)
    yield from _causal("conv_out", part.conv_out, prefix, 3)
    yield from norm_reasons("norm_out", part.norm_out, f"{prefix}RMS_norm")
    yield from silu_reasons("nonlinearity", part.nonlinearity)
    yield from class_reasons("mid_block", part.mid_block, f"{prefix}MidBlock", {"resnets", "attentions"})
    for index, resnet in enumerate(part.mid_block.resnets):
        yield from _resnet(f"mid_block.resnets.{index}", resnet, prefix)
    for index, attention in enumerate(part.mid_block.attentions):
        if attention is not None:
            yield from _attention(f"mid_block.attentions.{index}", attention, prefix)


def _attention(name: str, attention: Any, prefix: str) -> Iterator[str]:
    yield from class_reasons(name, attention, f"{prefix}AttentionBlock", {"norm", "to_qkv", "proj"})
    yield from norm_reasons(f"{name}.norm", attention.norm, f"{prefix}RMS_norm")
    yield from conv_reasons(f"{name}.to_qkv", attention.to_qkv, (1, 1))
    yield from conv_reasons(f"{name}.proj", attention.proj, (1, 1))


def _down_block(name: str, block: Any, prefix: str) -> Iterator[str]:
    """Check a block with a shortcut, or one layer of a plain encoder."""
    match type(block).__name__.removeprefix(prefix):
        case "ResidualDownBlock":
            parts = {"avg_shortcut", "resnets", "downsampler"}
            yield from class_reasons(name, block, f"{prefix}ResidualDownBlock", parts)
            yield from class_reasons(
                f"{name}.avg_shortcut", block.avg_shortcut, _shortcut_class(prefix, "AvgDown3D"), set()
            )
            for index, resnet in enumerate(block.resnets):
                yield from _resnet(f"{name}.resnets.{index}", resnet, prefix)
            if block.downsampler is not None:
                yield from _downsampler(f"{name}.downsampler", block.downsampler, prefix)
        case "ResidualBlock":
            yield from _resnet(name, block, prefix)
        case "AttentionBlock":
            yield from _attention(name, block, prefix)
        case _:
            yield from _downsampler(name, block, prefix)


def _downsampler(name: str, downsampler: Any, prefix: str) -> Iterator[str]:
    yield from class_reasons(name, downsampler, f"{prefix}Resample", {"resample", "time_conv"})
    if downsampler.mode not in ("downsample2d", "downsample3d"):
        yield f"{name} resamples by {downsampler.mode}."
        return
    padding, conv = downsampler.resample
    if not (isinstance(padding, nn.ZeroPad2d) and tuple(padding.padding) == (0, 1, 0, 1)):
        yield f"{name} pads in an unknown way."
    yield from conv_reasons(f"{name}.resample", conv, (3, 3), stride=(2, 2))
    if downsampler.mode == "downsample3d":
        time = downsampler.time_conv
        if isinstance(time, nn.Conv3d):
            yield from conv_reasons(f"{name}.time_conv", time, (3, 1, 1), stride=(2, 1, 1))
        else:
            yield from conv_reasons(f"{name}.time_conv", time, (1, 1))


def _up_block(name: str, block: Any, prefix: str) -> Iterator[str]:
    if type(block).__name__ == f"{prefix}ResidualUpBlock":
        yield from class_reasons(name, block, f"{prefix}ResidualUpBlock", {"avg_shortcut", "resnets", "upsampler"})
        if block.avg_shortcut is not None:
            yield from class_reasons(
                f"{name}.avg_shortcut", block.avg_shortcut, _shortcut_class(prefix, "DupUp3D"), set()
            )
    else:
        yield from class_reasons(name, block, f"{prefix}UpBlock", {"resnets", "upsamplers"})
    for index, resnet in enumerate(block.resnets):
        yield from _resnet(f"{name}.resnets.{index}", resnet, prefix)
    for upsampler in _upsamplers(block):
        yield from class_reasons(f"{name}.upsampler", upsampler, f"{prefix}Resample", {"resample", "time_conv"})
        if upsampler.mode not in ("upsample2d", "upsample3d"):
            yield f"{name} resamples by {upsampler.mode}."
            continue
        larger, conv = upsampler.resample
        if not (isinstance(larger, nn.Upsample) and larger.scale_factor == (2.0, 2.0) and "nearest" in larger.mode):
            yield f"{name} upsamples in an unknown way."
        yield from conv_reasons(f"{name}.resample", conv, (3, 3), (1, 1))
        if upsampler.mode == "upsample3d":
            time = upsampler.time_conv
            yield from conv_reasons(f"{name}.time_conv", time, (3, 1, 1) if isinstance(time, nn.Conv3d) else (1, 1))


def _shortcut_class(prefix: str, name: str) -> str:
    return name if prefix == "Wan" else f"{prefix}{name}"


def _upsamplers(block: Any) -> list[Any]:
    found = getattr(block, "upsamplers", None) or [getattr(block, "upsampler", None)]
    return [upsampler for upsampler in found if upsampler is not None]


def _resnet(name: str, resnet: Any, prefix: str) -> Iterator[str]:
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "dropout", "conv2", "conv_shortcut"}
    yield from class_reasons(name, resnet, f"{prefix}ResidualBlock", parts)
    yield from norm_reasons(f"{name}.norm1", resnet.norm1, f"{prefix}RMS_norm")
    yield from norm_reasons(f"{name}.norm2", resnet.norm2, f"{prefix}RMS_norm")
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    yield from _causal(f"{name}.conv1", resnet.conv1, prefix, 3)
    yield from _causal(f"{name}.conv2", resnet.conv2, prefix, 3)
    if not isinstance(resnet.conv_shortcut, nn.Identity):
        yield from _causal(f"{name}.conv_shortcut", resnet.conv_shortcut, prefix, 1)
    if resnet.training and resnet.dropout.p:
        yield f"{name} drops values."


def _causal(name: str, conv: Any, prefix: str, size: int) -> Iterator[str]:
    """Check a causal convolution. Its own padding is 0; `_padding` is what its forward adds."""
    yield from class_reasons(name, conv, f"{prefix}CausalConv3d", set())
    is_video = isinstance(conv, nn.Conv3d)
    yield from conv_reasons(name, conv, (size,) * (3 if is_video else 2))
    side = size // 2
    if tuple(conv._padding) != (side, side, side, side, *((2 * side, 0) if is_video else ())):
        yield f"{name} pads in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=take_pointwise(vae.post_quant_conv),
        conv_in=take_conv(decoder.conv_in, kernels),
        blocks=tuple(_take_blocks(decoder, kernels)),
        norm_out=take_norm(decoder.norm_out),
        conv_out=take_conv(decoder.conv_out, kernels),
        patch=getattr(vae.config, "patch_size", None) or 1,
        clamps=True,
        repeats_input=0,
        dtype=dtype,
        device=device,
    )


def take_encoder(vae: Any, kernels: CausalKernels) -> CausalEncoder:
    """Move the weights out of a VAE whose structure is known. Its own encode no longer works afterwards."""
    encoder = vae.encoder
    weight = encoder.conv_in.weight
    dtype, device, in_channels = weight.dtype, weight.device, weight.shape[1]
    return CausalEncoder(
        patch=getattr(vae.config, "patch_size", None) or 1,
        conv_in=take_conv(encoder.conv_in, kernels),
        in_channels=in_channels,
        blocks=tuple(_take_encoder_blocks(encoder, kernels)),
        norm_out=take_norm(encoder.norm_out),
        conv_out=take_conv(encoder.conv_out, kernels),
        averages_output=False,
        quant=take_pointwise(vae.quant_conv),
        dtype=dtype,
        device=device,
        only_multiples_of=CHUNK_FRAMES,
    )


def _take_encoder_blocks(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderBlock]:
    for block in encoder.down_blocks:
        if hasattr(block, "avg_shortcut"):
            steps: list[EncoderStep] = [_take_resnet(resnet, kernels) for resnet in block.resnets]
            if block.downsampler is not None:
                steps.append(_take_downsample(block.downsampler, kernels))
            shortcut = block.avg_shortcut
            yield EncoderBlock(tuple(steps), Average(shortcut.factor_t, shortcut.factor_s, shortcut.out_channels))
        elif hasattr(block, "conv1"):
            yield EncoderBlock((_take_resnet(block, kernels),))
        elif hasattr(block, "to_qkv"):
            yield EncoderBlock((_take_attention(block),))
        else:
            yield EncoderBlock((_take_downsample(block, kernels),))
    for step in take_mid_block(encoder.mid_block, partial(_take_resnet, kernels=kernels), _take_attention):
        yield EncoderBlock((step,))


def _take_downsample(downsampler: Any, kernels: CausalKernels) -> Downsample:
    weight, bias = take_weights(downsampler.resample[1])  # [O, I, 3, 3], [O]
    time = getattr(downsampler, "time_conv", None)
    return Downsample(
        space=kernels.planar.pack(weight, stride=2),
        bias=bias,
        out_channels=len(bias),
        time=_take_time(time) if isinstance(time, nn.Conv3d) else None,
    )


def _take_blocks(decoder: Any, kernels: CausalKernels) -> Iterator[Block]:
    for step in take_mid_block(decoder.mid_block, partial(_take_resnet, kernels=kernels), _take_attention):
        yield Block((step,))
    for block in decoder.up_blocks:
        steps: list[Step] = [_take_resnet(resnet, kernels) for resnet in block.resnets]
        steps += [_take_upsample(upsampler, kernels) for upsampler in _upsamplers(block)]
        shortcut = getattr(block, "avg_shortcut", None)
        yield Block(
            tuple(steps),
            None if shortcut is None else Duplicate(shortcut.repeats, shortcut.factor_t, shortcut.out_channels),
        )


def take_mid_block(
    block: Any, take_resnet: Callable[[Any], Resnet], take_attention: Callable[[Any], Attention]
) -> Iterator[Resnet | Attention]:
    """Yield the layers of a mid block in the order in which they run."""
    first, *rest = block.resnets
    yield take_resnet(first)
    for attention, resnet in zip(block.attentions, rest, strict=True):
        if attention is not None:
            yield take_attention(attention)
        yield take_resnet(resnet)


def take_norm(norm: Any) -> PixelNorm:
    """Take the weight of a norm, with the factor sqrt(C) inside."""
    weight = norm.gamma.detach().float().flatten() * norm.scale  # [C]
    empty(norm)
    return PixelNorm(weight)


def take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    """Take a causal convolution that pads with zeros, so that only the last tap sees the first frame of a video."""
    weight, bias = conv.weight.detach(), conv.bias.detach()  # [O, I, 3, 3, 3] or [O, I, 3, 3], [O]
    empty(conv)
    if weight.ndim == 4:  # for images only
        packed = kernels.planar.pack(weight)
        return CausalConv(packed, packed, bias, len(bias))
    first = kernels.planar.pack(weight[:, :, -1].contiguous())  # [O, I, 3, 3]
    return CausalConv(kernels.pack(weight), first, bias, len(bias))


def take_pointwise(conv: Any) -> Linear:
    """Take a convolution of one pixel."""
    weight, bias = conv.weight.detach().flatten(1).contiguous(), conv.bias.detach()  # [O, I], [O]
    empty(conv)
    return Linear(weight, bias)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    shortcut = None if isinstance(resnet.conv_shortcut, nn.Identity) else take_pointwise(resnet.conv_shortcut)
    conv1, conv2 = take_conv(resnet.conv1, kernels), take_conv(resnet.conv2, kernels)
    return Resnet(take_norm(resnet.norm1), conv1, take_norm(resnet.norm2), conv2, shortcut)


def _take_attention(attention: Any) -> Attention:
    joint, out = take_linear(attention.to_qkv), take_pointwise(attention.proj)
    assert joint.bias is not None
    query, key, value = (
        Linear(weight, bias) for weight, bias in zip(joint.weight.chunk(3), joint.bias.chunk(3), strict=True)
    )
    return fold_attention(take_norm(attention.norm), query, key, value, out, sees_past=False)


def fold_attention(
    norm: PixelNorm, query: Linear, key: Linear, value: Linear, out: Linear, *, sees_past: bool
) -> Attention:
    """Fold the output projection into the values: rows of the softmax sum to one, so W_o P v + b_o = P W_o v + b_o.

    The bias of the key adds the same to every score of a row and is dropped.
    """
    assert value.bias is not None
    assert out.bias is not None
    weight = precise(out.weight) @ precise(value.weight)  # [C, C]
    bias = precise(out.weight) @ precise(value.bias) + precise(out.bias)  # [C]
    folded = Linear(rounded(weight, query.weight), None)
    return Attention(
        norm,
        Linear(query.weight.contiguous(), query.bias),
        Linear(key.weight.contiguous(), None),
        folded,
        rounded(bias, query.weight),
        sees_past,
    )


def _take_upsample(upsampler: Any, kernels: CausalKernels) -> Upsample:
    conv = upsampler.resample[1]
    weight, bias = conv.weight.detach(), conv.bias.detach()  # [O, I, 3, 3], [O]
    empty(conv)
    time = getattr(upsampler, "time_conv", None)
    return Upsample(
        time=_take_time(time) if isinstance(time, nn.Conv3d) else None,
        space=kernels.planar.pack(fold_upsample(weight)),
        bias=bias,
        out_channels=len(bias),
    )


def _take_time(conv: Any) -> Linear:
    weight, bias = conv.weight.detach()[..., 0, 0], conv.bias.detach()  # [O, C, 3], [O]
    empty(conv)
    return Linear(weight.permute(0, 2, 1).flatten(1).contiguous(), bias)  # [O, 3 C], the oldest frame first
