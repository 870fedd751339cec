"""EasyAnimate's VAE (AutoencoderKLMagvit): check that the structure is known, and take the weights.

Its norms span a frame or the frames of a chunk, as the checkpoint says; a chunk is what one latent frame becomes. Rows
and columns around a frame are zero, frames before the video repeat the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image.layers import take_linear, take_norm
from ..image.structure import norm_reasons
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
from .causal_structure import class_reasons, conv_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv, take_causal_upsample

NAME = "AutoencoderKLMagvit"
PREFIX = "EasyAnimate"


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_reasons(vae), None)


def _reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    parts = {"conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"}
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder", parts)
    yield from conv_reasons("post_quant_conv", vae.post_quant_conv, (1, 1, 1))
    if vae.num_latent_frames_batch_size != 1:
        yield f"It decodes {vae.num_latent_frames_batch_size} latent frames at a time, not 1."
    yield from _causal("conv_in", decoder.conv_in)
    yield from _causal("conv_out", decoder.conv_out)
    yield from norm_reasons("conv_norm_out", decoder.conv_norm_out)
    yield from silu_reasons("conv_act", decoder.conv_act)
    yield from class_reasons("mid_block", decoder.mid_block, f"{PREFIX}MidBlock3d", {"convs"})
    for index, block in enumerate((decoder.mid_block, *decoder.up_blocks), start=-1):
        name = "mid_block" if index < 0 else f"up_blocks.{index}"
        for place, resnet in enumerate(block.convs):
            yield from _resnet(f"{name}.convs.{place}", resnet)
    for index, block in enumerate(decoder.up_blocks):
        name = f"up_blocks.{index}"
        yield from class_reasons(name, block, f"{PREFIX}UpBlock3d", {"convs", "upsampler"})
        if block.upsampler is not None:
            yield from class_reasons(f"{name}.upsampler", block.upsampler, f"{PREFIX}Upsampler3D", {"conv"})
            yield from _causal(f"{name}.upsampler.conv", block.upsampler.conv)
    yield from weights_reasons(decoder)


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


def _causal(name: str, conv: Any) -> Iterator[str]:
    yield from class_reasons(name, conv, f"{PREFIX}CausalConv3d", set())
    yield from conv_reasons(name, conv, (3, 3, 3), (0, 1, 1))
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
