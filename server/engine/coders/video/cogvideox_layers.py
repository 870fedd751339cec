"""CogVideoX: check that the structure is known, and take the weights.

Its norms span the frames of a chunk. Those of the decoder are scaled and shifted by the latents. Rows and columns
around a frame are zero, frames before the video repeat the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import Linear, empty, fold_upsample, take_linear, take_norm, take_weights
from ..image.structure import norm_reasons
from .causal_encoder_layers import CausalEncoder, Chunks, Downsample, EncoderBlock, EncoderStep
from .causal_layers import Before, Block, CausalConv, CausalDecoder, Resnet, Span, SpanNorm, Step, Upsample
from .causal_structure import chunk_reasons, class_reasons, conv_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv

NAME = "AutoencoderKLCogVideoX"
PREFIX = "CogVideoX"
NormReasons = Callable[[str, Any], Iterator[str]]
"""Yields reasons why a norm of this name is not known."""


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    parts = {"conv_in", "mid_block", "up_blocks", "norm_out", "conv_act", "conv_out"}
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder3D", parts)
    if vae.post_quant_conv is not None:
        yield from conv_reasons("post_quant_conv", vae.post_quant_conv, (1, 1, 1))
    if vae.num_latent_frames_batch_size != 2:
        yield f"It decodes {vae.num_latent_frames_batch_size} latent frames at a time, not 2."
    yield from _ends(decoder, _spatial_norm)
    for index, block in enumerate(decoder.up_blocks):
        name = f"up_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}UpBlock3D", {"resnets", "upsamplers"})
        for place, resnet in enumerate(block.resnets):
            yield from _resnet(f"{name}.resnets.{place}", resnet, _spatial_norm)
        for upsampler in block.upsamplers or ():
            yield from class_reasons(f"{name}.upsampler", upsampler, f"{PREFIX}Upsample3D", {"conv"})
            yield from conv_reasons(f"{name}.upsampler.conv", upsampler.conv, (3, 3), (1, 1))
    yield from weights_reasons(decoder)


def _encoder_reasons(vae: Any) -> Iterator[str]:
    encoder = vae.encoder
    parts = {"conv_in", "down_blocks", "mid_block", "norm_out", "conv_act", "conv_out"}
    yield from class_reasons("encoder", encoder, f"{PREFIX}Encoder3D", parts)
    if vae.quant_conv is not None:
        yield from conv_reasons("quant_conv", vae.quant_conv, (1, 1, 1))
    yield from _ends(encoder, norm_reasons)
    ratio = 1
    for index, block in enumerate(encoder.down_blocks):
        name = f"down_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}DownBlock3D", {"resnets", "downsamplers"})
        for place, resnet in enumerate(block.resnets):
            yield from _resnet(f"{name}.resnets.{place}", resnet, norm_reasons)
        for downsampler in block.downsamplers or ():
            yield from class_reasons(f"{name}.downsampler", downsampler, f"{PREFIX}Downsample3D", {"conv"})
            yield from conv_reasons(f"{name}.downsampler.conv", downsampler.conv, (3, 3), stride=(2, 2))
            ratio *= 2 if downsampler.compress_time else 1
    yield from chunk_reasons(vae.num_sample_frames_batch_size, ratio)
    yield from weights_reasons(encoder)


def _ends(network: Any, norm_reasons_of: NormReasons) -> Iterator[str]:
    """Check the layers that a decoder and an encoder have in common. norm_reasons_of: checks a norm."""
    yield from _causal("conv_in", network.conv_in, 3)
    yield from _causal("conv_out", network.conv_out, 3)
    yield from norm_reasons_of("norm_out", network.norm_out)
    yield from silu_reasons("conv_act", network.conv_act)
    yield from class_reasons("mid_block", network.mid_block, f"{PREFIX}MidBlock3D", {"resnets"})
    for index, resnet in enumerate(network.mid_block.resnets):
        yield from _resnet(f"mid_block.resnets.{index}", resnet, norm_reasons_of)


def _resnet(name: str, resnet: Any, norm_reasons_of: NormReasons) -> Iterator[str]:
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "dropout", "conv2", "conv_shortcut"}
    yield from class_reasons(name, resnet, f"{PREFIX}ResnetBlock3D", parts)
    yield from norm_reasons_of(f"{name}.norm1", resnet.norm1)
    yield from norm_reasons_of(f"{name}.norm2", resnet.norm2)
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    yield from _causal(f"{name}.conv1", resnet.conv1, 3)
    yield from _causal(f"{name}.conv2", resnet.conv2, 3)
    if resnet.in_channels != resnet.out_channels:
        yield from conv_reasons(f"{name}.conv_shortcut", resnet.conv_shortcut, (1, 1, 1))
    if resnet.training and resnet.dropout.p:
        yield f"{name} drops values."


def _spatial_norm(name: str, norm: Any) -> Iterator[str]:
    yield from class_reasons(name, norm, f"{PREFIX}SpatialNorm3D", {"norm_layer", "conv_y", "conv_b"})
    yield from norm_reasons(f"{name}.norm_layer", norm.norm_layer)
    yield from _causal(f"{name}.conv_y", norm.conv_y, 1)
    yield from _causal(f"{name}.conv_b", norm.conv_b, 1)


def _causal(name: str, conv: Any, size: int) -> Iterator[str]:
    yield from class_reasons(name, conv, f"{PREFIX}CausalConv3d", {"conv"})
    side = size // 2
    yield from conv_reasons(f"{name}.conv", conv.conv, (size,) * 3, (0, side, side))
    if conv.pad_mode == "replicate" or conv.time_kernel_size != size:
        yield f"{name} pads in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.conv.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=None if vae.post_quant_conv is None else take_linear(vae.post_quant_conv),
        conv_in=_take_conv(decoder.conv_in, kernels),
        blocks=tuple(Block((step,)) for step in _take_steps(decoder, kernels)),
        norm_out=_take_norm(decoder.norm_out),
        conv_out=_take_conv(decoder.conv_out, kernels),
        chunk=vae.num_latent_frames_batch_size,
        dtype=dtype,
        device=device,
    )


def take_encoder(vae: Any, kernels: CausalKernels) -> CausalEncoder:
    """Move the weights out of a VAE whose structure is known. Its own encode no longer works afterwards."""
    encoder = vae.encoder
    weight = encoder.conv_in.conv.weight
    dtype, device, in_channels = weight.dtype, weight.device, weight.shape[1]
    return CausalEncoder(
        patch=1,
        conv_in=_take_conv(encoder.conv_in, kernels),
        in_channels=in_channels,
        blocks=tuple(EncoderBlock((step,)) for step in _take_encoder_steps(encoder, kernels)),
        norm_out=_take_norm(encoder.norm_out),
        conv_out=_take_conv(encoder.conv_out, kernels),
        averages_output=False,
        quant=None if vae.quant_conv is None else take_linear(vae.quant_conv),
        dtype=dtype,
        device=device,
        chunks=Chunks(vae.num_sample_frames_batch_size, first_takes_rest=True),
    )


def _take_encoder_steps(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderStep]:
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield _take_resnet(resnet, kernels)
        for downsampler in block.downsamplers or ():
            weight, bias = take_weights(downsampler.conv)  # [O, I, 3, 3], [O]
            space, averages = kernels.planar.pack(weight, stride=2), bool(downsampler.compress_time)
            yield Downsample(space, bias, len(bias), averages_frames=averages)
    for resnet in encoder.mid_block.resnets:
        yield _take_resnet(resnet, kernels)


def _take_steps(decoder: Any, kernels: CausalKernels) -> Iterator[Step]:
    for resnet in decoder.mid_block.resnets:
        yield _take_resnet(resnet, kernels)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield _take_resnet(resnet, kernels)
        for upsampler in block.upsamplers or ():
            yield _take_upsample(upsampler, kernels)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    shortcut: Linear | None = None
    if resnet.in_channels != resnet.out_channels:
        shortcut = take_linear(resnet.conv_shortcut)
    conv1, conv2 = _take_conv(resnet.conv1, kernels), _take_conv(resnet.conv2, kernels)
    return Resnet(_take_norm(resnet.norm1), conv1, _take_norm(resnet.norm2), conv2, shortcut)


def _take_upsample(upsampler: Any, kernels: CausalKernels) -> Upsample:
    """Take an upsampling layer. It repeats frames before its convolution, which looks at single frames.

    Repeating them afterwards gives the same.
    """
    weight, bias = upsampler.conv.weight.detach(), upsampler.conv.bias.detach()  # [O, I, 3, 3], [O]
    empty(upsampler.conv)
    space = kernels.planar.pack(fold_upsample(weight))
    return Upsample(None, space, bias, len(bias), repeats=bool(upsampler.compress_time))


def _take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    return take_causal_conv(conv.conv, kernels, Before.FIRST_FRAME)


def _take_norm(norm: Any) -> SpanNorm:
    if isinstance(norm, nn.GroupNorm):
        return SpanNorm(take_norm(norm), Span.CHUNK)
    scale, shift = take_linear(norm.conv_y.conv), take_linear(norm.conv_b.conv)
    return SpanNorm(take_norm(norm.norm_layer), Span.CHUNK, scale, shift)
