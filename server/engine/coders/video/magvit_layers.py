"""EasyAnimate's VAE (AutoencoderKLMagvit): check that the structure is known, and take the weights.

Its norms span a frame or the frames of a chunk, as the checkpoint says. For the decoder, a chunk is what one latent
frame becomes. Rows and columns around a frame are zero, frames before the video repeat the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import take_linear, take_norm
from ..image.structure import norm_reasons
from .causal_encoder_layers import Beside, CausalEncoder, Chunks, EncoderBlock, EncoderStep
from .causal_layers import (
    Before,
    Block,
    CausalConv,
    CausalDecoder,
    CausalUpsample,
    Doubling,
    Resnet,
    Span,
    SpanNorm,
    Step,
)
from .causal_structure import chunk_reasons, class_reasons, conv_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv, take_causal_downsample, take_causal_upsample

NAME = "AutoencoderKLMagvit"
PREFIX = "EasyAnimate"


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    parts = {"conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"}
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder", parts)
    yield from conv_reasons("post_quant_conv", vae.post_quant_conv, (1, 1, 1))
    if vae.num_latent_frames_batch_size != 1:
        yield f"It decodes {vae.num_latent_frames_batch_size} latent frames at a time, not 1."
    yield from _ends(decoder)
    for index, block in enumerate(decoder.up_blocks):
        name = f"up_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}UpBlock3d", {"convs", "upsampler"})
        yield from _resnets(name, block)
        if block.upsampler is not None:
            yield from class_reasons(f"{name}.upsampler", block.upsampler, f"{PREFIX}Upsampler3D", {"conv"})
            yield from _causal(f"{name}.upsampler.conv", block.upsampler.conv)
    yield from weights_reasons(decoder)


def _encoder_reasons(vae: Any) -> Iterator[str]:
    encoder = vae.encoder
    parts = {"conv_in", "down_blocks", "mid_block", "conv_norm_out", "conv_act", "conv_out"}
    yield from class_reasons("encoder", encoder, f"{PREFIX}Encoder", parts)
    yield from conv_reasons("quant_conv", vae.quant_conv, (1, 1, 1))
    yield from _ends(encoder)
    ratio = 1
    for index, block in enumerate(encoder.down_blocks):
        name = f"down_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}DownBlock3D", {"convs", "downsampler"})
        yield from _resnets(name, block)
        if block.downsampler is not None:
            yield from class_reasons(f"{name}.downsampler", block.downsampler, f"{PREFIX}Downsampler3D", {"conv"})
            times = 2 if block.downsampler.conv.stride[0] == 2 else 1
            yield from _causal(f"{name}.downsampler.conv", block.downsampler.conv, side=0, stride=(times, 2, 2))
            ratio *= times
    yield from chunk_reasons(vae.num_sample_frames_batch_size, ratio)
    yield from weights_reasons(encoder)


def _ends(network: Any) -> Iterator[str]:
    """Check the layers that a decoder and an encoder have in common."""
    yield from _causal("conv_in", network.conv_in)
    yield from _causal("conv_out", network.conv_out)
    yield from norm_reasons("conv_norm_out", network.conv_norm_out)
    yield from silu_reasons("conv_act", network.conv_act)
    yield from class_reasons("mid_block", network.mid_block, f"{PREFIX}MidBlock3d", {"convs"})
    yield from _resnets("mid_block", network.mid_block)


def _resnets(name: str, block: Any) -> Iterator[str]:
    for place, resnet in enumerate(block.convs):
        yield from _resnet(f"{name}.convs.{place}", resnet)


def _resnet(name: str, resnet: Any) -> Iterator[str]:
    parts = {"norm1", "nonlinearity", "conv1", "norm2", "dropout", "conv2", "shortcut"}
    yield from class_reasons(name, resnet, f"{PREFIX}ResidualBlock3D", parts)
    yield from norm_reasons(f"{name}.norm1", resnet.norm1)
    yield from norm_reasons(f"{name}.norm2", resnet.norm2)
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    yield from _causal(f"{name}.conv1", resnet.conv1)
    yield from _causal(f"{name}.conv2", resnet.conv2)
    if not isinstance(resnet.shortcut, nn.Identity):
        yield from conv_reasons(f"{name}.shortcut", resnet.shortcut, (1, 1, 1))
    if resnet.training and resnet.dropout.p:
        yield f"{name} drops values."
    if resnet.output_scale_factor != 1:
        yield f"{name} divides its output by {resnet.output_scale_factor}."


def _causal(name: str, conv: Any, *, side: int = 1, stride: tuple[int, int, int] | None = None) -> Iterator[str]:
    """Check a causal convolution. side: its padding on each side of a frame. stride: by axis; None means 1."""
    yield from class_reasons(name, conv, f"{PREFIX}CausalConv3d", set())
    yield from conv_reasons(name, conv, (3, 3, 3), (0, side, side), stride)
    if conv.temporal_padding != 2:
        yield f"{name} pads in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=take_linear(vae.post_quant_conv),
        conv_in=_take_conv(decoder.conv_in, kernels),
        blocks=tuple(Block((step,)) for step in _take_steps(decoder, kernels)),
        norm_out=_take_norm(decoder.conv_norm_out, decoder.spatial_group_norm),
        conv_out=_take_conv(decoder.conv_out, kernels),
        dtype=dtype,
        device=device,
    )


def take_encoder(vae: Any, kernels: CausalKernels) -> CausalEncoder:
    """Move the weights out of a VAE whose structure is known. Its own encode no longer works afterwards."""
    encoder = vae.encoder
    weight = encoder.conv_in.weight
    dtype, device, in_channels = weight.dtype, weight.device, weight.shape[1]
    return CausalEncoder(
        patch=1,
        conv_in=_take_conv(encoder.conv_in, kernels),
        in_channels=in_channels,
        blocks=tuple(EncoderBlock((step,)) for step in _take_encoder_steps(encoder, kernels)),
        norm_out=_take_norm(encoder.conv_norm_out, encoder.spatial_group_norm),
        conv_out=_take_conv(encoder.conv_out, kernels),
        averages_output=False,
        quant=take_linear(vae.quant_conv),
        dtype=dtype,
        device=device,
        chunks=Chunks(vae.num_sample_frames_batch_size, first_takes_rest=False),
    )


def _take_encoder_steps(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderStep]:
    for block in encoder.down_blocks:
        for resnet in block.convs:
            yield _take_resnet(resnet, kernels)
        if block.downsampler is not None:
            yield take_causal_downsample(block.downsampler.conv, kernels, Beside.ZEROS_AFTER)
    for resnet in encoder.mid_block.convs:
        yield _take_resnet(resnet, kernels)


def _take_steps(decoder: Any, kernels: CausalKernels) -> Iterator[Step]:
    for resnet in decoder.mid_block.convs:
        yield _take_resnet(resnet, kernels)
    for block in decoder.up_blocks:
        for resnet in block.convs:
            yield _take_resnet(resnet, kernels)
        if block.upsampler is not None:
            yield _take_upsample(block.upsampler, kernels)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    shortcut = None if isinstance(resnet.shortcut, nn.Identity) else take_linear(resnet.shortcut)
    conv1, conv2 = _take_conv(resnet.conv1, kernels), _take_conv(resnet.conv2, kernels)
    of_frames = resnet.spatial_group_norm
    return Resnet(_take_norm(resnet.norm1, of_frames), conv1, _take_norm(resnet.norm2, of_frames), conv2, shortcut)


def _take_upsample(upsampler: Any, kernels: CausalKernels) -> CausalUpsample:
    after = None
    if upsampler.temporal_upsample:
        after = Doubling.NEAREST if upsampler.spatial_group_norm else Doubling.LINEAR
    return take_causal_upsample(upsampler.conv, kernels, times=1, replicates=False, after=after)


def _take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    return take_causal_conv(conv, kernels, Before.FIRST_FRAME)


def _take_norm(norm: Any, is_of_frames: bool) -> SpanNorm:
    return SpanNorm(take_norm(norm), Span.FRAME if is_of_frames else Span.CHUNK)
