"""HunyuanVideo 1.5: check that the structure is known, and take the weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...kernels.causal_kernels import CausalKernels
from .causal_encoder_layers import CausalEncoder, EncoderBlock, EncoderStep, Fold
from .causal_layers import Attention, Before, Block, CausalConv, CausalDecoder, Resnet, Step, Unfold
from .causal_structure import class_reasons, conv_reasons, norm_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv
from .wan_layers import fold_attention, take_mid_block, take_norm, take_pointwise

NAME = "AutoencoderKLHunyuanVideo15"
PREFIX = "HunyuanVideo15"
PADDING = (1, 1, 1, 1, 2, 0)
ENDS = {"conv_in", "mid_block", "norm_out", "conv_act", "conv_out"}


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    decoder = vae.decoder
    yield from class_reasons("decoder", decoder, f"{PREFIX}Decoder3D", ENDS | {"up_blocks"})
    yield from _ends(decoder)
    for index, block in enumerate(decoder.up_blocks):
        yield from _resampling(f"up_blocks.{index}", block, "Up")
    yield from weights_reasons(decoder)


def _encoder_reasons(vae: Any) -> Iterator[str]:
    encoder = vae.encoder
    yield from class_reasons("encoder", encoder, f"{PREFIX}Encoder3D", ENDS | {"down_blocks"})
    yield from _ends(encoder)
    for index, block in enumerate(encoder.down_blocks):
        yield from _resampling(f"down_blocks.{index}", block, "Down")
    yield from weights_reasons(encoder)


def _ends(part: Any) -> Iterator[str]:
    """Check a decoder or encoder except its up or down blocks."""
    middle = part.mid_block
    yield from _causal("conv_in", part.conv_in)
    yield from _causal("conv_out", part.conv_out)
    yield from norm_reasons("norm_out", part.norm_out, f"{PREFIX}RMS_norm")
    yield from silu_reasons("conv_act", part.conv_act)
    yield from class_reasons("mid_block", middle, f"{PREFIX}MidBlock", {"resnets", "attentions"})
    for index, resnet in enumerate(middle.resnets):
        yield from _resnet(f"mid_block.resnets.{index}", resnet)
    for index, attention in enumerate(middle.attentions):
        if attention is not None:
            name, projections = f"mid_block.attentions.{index}", ("to_q", "to_k", "to_v", "proj_out")
            yield from class_reasons(name, attention, f"{PREFIX}AttnBlock", {"norm", *projections})
            yield from norm_reasons(f"{name}.norm", attention.norm, f"{PREFIX}RMS_norm")
            for projection in projections:
                yield from conv_reasons(f"{name}.{projection}", attention.get_submodule(projection), (1, 1, 1))


def _resampling(name: str, block: Any, direction: str) -> Iterator[str]:
    """Check an up or down block. direction: `Up` or `Down`."""
    samplers = f"{direction.lower()}samplers"
    yield from class_reasons(name, block, f"{PREFIX}{direction}Block3D", {"resnets", samplers})
    for place, resnet in enumerate(block.resnets):
        yield from _resnet(f"{name}.resnets.{place}", resnet)
    for sampler in getattr(block, samplers) or ():
        yield from class_reasons(f"{name}.{samplers}", sampler, f"{PREFIX}{direction}sample", {"conv"})
        yield from _causal(f"{name}.{samplers}.conv", sampler.conv)


def _resnet(name: str, resnet: Any) -> Iterator[str]:
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "conv2", "conv_shortcut"}
    yield from class_reasons(name, resnet, f"{PREFIX}ResnetBlock", parts)
    yield from norm_reasons(f"{name}.norm1", resnet.norm1, f"{PREFIX}RMS_norm")
    yield from norm_reasons(f"{name}.norm2", resnet.norm2, f"{PREFIX}RMS_norm")
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    yield from _causal(f"{name}.conv1", resnet.conv1)
    yield from _causal(f"{name}.conv2", resnet.conv2)
    if resnet.conv_shortcut is not None:
        yield from conv_reasons(f"{name}.conv_shortcut", resnet.conv_shortcut, (1, 1, 1))


def _causal(name: str, conv: Any) -> Iterator[str]:
    yield from class_reasons(name, conv, f"{PREFIX}CausalConv3d", {"conv"})
    yield from conv_reasons(f"{name}.conv", conv.conv, (3, 3, 3))
    if tuple(conv.time_causal_padding) != PADDING or conv.pad_mode != "replicate":
        yield f"{name} pads in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.conv.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=None,
        conv_in=take_conv(decoder.conv_in, kernels),
        blocks=tuple(_take_blocks(decoder, kernels)),
        norm_out=take_norm(decoder.norm_out),
        conv_out=take_conv(decoder.conv_out, kernels),
        patch=1,
        clamps=False,
        repeats_input=decoder.repeat,
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
        conv_in=take_conv(encoder.conv_in, kernels),
        in_channels=in_channels,
        blocks=tuple(_take_encoder_blocks(encoder, kernels)),
        norm_out=take_norm(encoder.norm_out),
        conv_out=take_conv(encoder.conv_out, kernels),
        averages_output=True,
        quant=None,
        dtype=dtype,
        device=device,
    )


def _take_encoder_blocks(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderBlock]:
    for block in encoder.down_blocks:
        steps: list[EncoderStep] = [_take_resnet(resnet, kernels) for resnet in block.resnets]
        steps += [_take_fold(downsampler, kernels) for downsampler in block.downsamplers or ()]
        yield EncoderBlock(tuple(steps))
    for step in take_mid_block(encoder.mid_block, partial(_take_resnet, kernels=kernels), _take_attention):
        yield EncoderBlock((step,))


def _take_fold(downsampler: Any, kernels: CausalKernels) -> Fold:
    times = 2 if downsampler.add_temporal_downsample else 1
    conv = take_conv(downsampler.conv, kernels)
    return Fold(conv, times, conv.out_channels * 4 * times)


def _take_blocks(decoder: Any, kernels: CausalKernels) -> Iterator[Block]:
    for step in take_mid_block(decoder.mid_block, partial(_take_resnet, kernels=kernels), _take_attention):
        yield Block((step,))
    for block in decoder.up_blocks:
        steps: list[Step] = [_take_resnet(resnet, kernels) for resnet in block.resnets]
        steps += [_take_unfold(upsampler, kernels) for upsampler in block.upsamplers or ()]
        yield Block(tuple(steps))


def take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    """Take a 3x3x3 convolution that pads by repeating the edges, so that all taps see a video's first frame."""
    return take_causal_conv(conv.conv, kernels, Before.FIRST_FRAME, replicates=True)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    shortcut = None if resnet.conv_shortcut is None else take_pointwise(resnet.conv_shortcut)
    conv1, conv2 = take_conv(resnet.conv1, kernels), take_conv(resnet.conv2, kernels)
    return Resnet(take_norm(resnet.norm1), conv1, take_norm(resnet.norm2), conv2, shortcut)


def _take_attention(attention: Any) -> Attention:
    parts = (attention.to_q, attention.to_k, attention.to_v, attention.proj_out)
    query, key, value, out = map(take_pointwise, parts)
    return fold_attention(take_norm(attention.norm), query, key, value, out, sees_past=True)


def _take_unfold(upsampler: Any, kernels: CausalKernels) -> Unfold:
    times = 2 if upsampler.add_temporal_upsample else 1
    conv = take_conv(upsampler.conv, kernels)
    return Unfold(conv, times, conv.out_channels // (4 * times))
