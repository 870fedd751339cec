"""HunyuanVideo: check that the structure is known, and take the weights.

Its norms span the whole video. The result is that of diffusers with `use_framewise_decoding` and
`use_framewise_encoding` off: no temporal tiles, no blending.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock
from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image import layers as image
from ..image.layers import take_linear, take_mid_block, take_norm, take_steps
from ..image.structure import attention_reasons, norm_reasons
from .causal_encoder_layers import Beside, CausalEncoder, EncoderBlock, EncoderStep
from .causal_layers import (
    Attention,
    Before,
    Block,
    CausalConv,
    CausalDecoder,
    CausalUpsample,
    Resnet,
    Span,
    SpanNorm,
    Step,
)
from .causal_structure import weights_reasons
from .causal_weights import take_causal_conv, take_causal_downsample, take_causal_upsample

NAME = "AutoencoderKLHunyuanVideo"
SHARED = {
    stock.HunyuanVideoMidBlock3D,
    stock.HunyuanVideoResnetBlockCausal3D,
    stock.HunyuanVideoCausalConv3d,
    StockAttention,
    nn.ModuleList,
    nn.Conv3d,
    nn.GroupNorm,
    nn.SiLU,
    nn.Linear,
    nn.Dropout,
}
DECODER = SHARED | {stock.HunyuanVideoDecoder3D, stock.HunyuanVideoUpBlock3D, stock.HunyuanVideoUpsampleCausal3D}
ENCODER = SHARED | {stock.HunyuanVideoEncoder3D, stock.HunyuanVideoDownBlock3D, stock.HunyuanVideoDownsampleCausal3D}


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_reasons("decoder", vae.decoder, DECODER), None)


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_reasons("encoder", vae.encoder, ENCODER), None)


def _reasons(part: str, network: Any, known: set[type[nn.Module]]) -> Iterator[str]:
    """Check the layers of a decoder or an encoder. part: its name. known: the classes that it may consist of."""
    halving = {module.conv for module in network.modules() if type(module) is stock.HunyuanVideoDownsampleCausal3D}
    for name, module in network.named_modules(prefix=part):
        if type(module) not in known:
            yield f"{name} is a {type(module).__name__}."
        elif isinstance(module, StockAttention):
            yield from attention_reasons(name, module)
        elif isinstance(module, nn.GroupNorm):
            yield from norm_reasons(name, module)
        elif isinstance(module, stock.HunyuanVideoCausalConv3d):
            strides = ((1, 2, 2), (2, 2, 2)) if module in halving else ((1, 1, 1),)
            if not (_is_plain_conv(module) and module.conv.stride in strides):
                yield f"{name} is not a plain causal convolution."
        elif isinstance(module, stock.HunyuanVideoUpsampleCausal3D) and not _is_known_upsample(module):
            yield f"{name} upsamples by {module.upsample_factor}."
    yield from weights_reasons(network)


def _is_plain_conv(causal: Any) -> bool:
    conv = causal.conv
    size: int = conv.kernel_size[0]
    return (
        causal.pad_mode == "replicate"
        and size in (1, 3)
        and conv.kernel_size == (size,) * 3
        and causal.time_causal_padding == (size // 2,) * 4 + (size - 1, 0)
        and conv.dilation == (1, 1, 1)
        and conv.padding == (0, 0, 0)
        and conv.groups == 1
        and conv.bias is not None
    )


def _is_known_upsample(upsampler: Any) -> bool:
    return tuple(upsampler.upsample_factor) in ((1, 2, 2), (2, 2, 2))


def take_decoder(vae: Any, kernels: CausalKernels) -> CausalDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight = decoder.conv_in.conv.weight
    dtype, device = weight.dtype, weight.device
    return CausalDecoder(
        post_quant=take_linear(vae.post_quant_conv),
        conv_in=_take_conv(decoder.conv_in, kernels),
        blocks=tuple(Block((step,)) for step in _take_steps(decoder, kernels)),
        norm_out=_take_norm(decoder.conv_norm_out),
        conv_out=_take_conv(decoder.conv_out, kernels),
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
        norm_out=_take_norm(encoder.conv_norm_out),
        conv_out=_take_conv(encoder.conv_out, kernels),
        averages_output=False,
        quant=take_linear(vae.quant_conv),
        dtype=dtype,
        device=device,
    )


def _take_steps(decoder: Any, kernels: CausalKernels) -> Iterator[Step]:
    def resnet(block: Any) -> Step:
        return _take_resnet(block, kernels)

    def upsample(upsampler: Any) -> CausalUpsample:
        times = int(upsampler.upsample_factor[0])
        return take_causal_upsample(upsampler.conv.conv, kernels, times=times, replicates=True)

    for step in take_steps(decoder, resnet, upsample):
        yield _over_frames(step) if isinstance(step, image.Attention) else step


def _take_encoder_steps(encoder: Any, kernels: CausalKernels) -> Iterator[EncoderStep]:
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield _take_resnet(resnet, kernels)
        for downsampler in block.downsamplers or ():
            yield take_causal_downsample(downsampler.conv.conv, kernels, Beside.EDGES_BEFORE)
    for step in take_mid_block(encoder.mid_block, lambda resnet: _take_resnet(resnet, kernels)):
        yield _over_frames(step) if isinstance(step, image.Attention) else step


def _take_resnet(block: Any, kernels: CausalKernels) -> Resnet:
    shortcut = None if block.conv_shortcut is None else take_linear(block.conv_shortcut.conv)
    conv1, conv2 = _take_conv(block.conv1, kernels), _take_conv(block.conv2, kernels)
    return Resnet(_take_norm(block.norm1), conv1, _take_norm(block.norm2), conv2, shortcut)


def _take_conv(causal: Any, kernels: CausalKernels) -> CausalConv:
    return take_causal_conv(causal.conv, kernels, Before.FIRST_FRAME, replicates=True)


def _over_frames(step: image.Attention) -> Attention:
    """Return an image's attention as one to all positions of a frame and of the frames before it."""
    norm = SpanNorm(step.norm, Span.VIDEO)
    return Attention(norm, step.query, step.key, step.value, step.bias, sees_past=True)


def _take_norm(norm: Any) -> SpanNorm:
    return SpanNorm(take_norm(norm), Span.VIDEO)
