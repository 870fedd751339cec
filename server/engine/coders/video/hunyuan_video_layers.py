"""HunyuanVideo: check that the structure is known, and take the weights.

Its norms span the whole video. What is computed is what diffusers computes with `use_framewise_decoding` off: no
temporal tiles, no blending.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock
from torch import nn

from ...kernels.causal_kernels import CausalKernels
from ..image import layers as image
from ..image.layers import take_linear, take_norm, take_steps
from ..image.structure import attention_reasons, norm_reasons
from .causal_layers import Attention, Before, Block, CausalDecoder, CausalUpsample, Resnet, Span, SpanNorm, Step
from .causal_structure import weights_reasons
from .causal_weights import take_causal_conv, take_causal_upsample

NAME = "AutoencoderKLHunyuanVideo"
KNOWN = {
    stock.HunyuanVideoDecoder3D,
    stock.HunyuanVideoMidBlock3D,
    stock.HunyuanVideoUpBlock3D,
    stock.HunyuanVideoResnetBlockCausal3D,
    stock.HunyuanVideoUpsampleCausal3D,
    stock.HunyuanVideoCausalConv3d,
    StockAttention,
    nn.ModuleList,
    nn.Conv3d,
    nn.GroupNorm,
    nn.SiLU,
    nn.Linear,
    nn.Dropout,
}


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal decoder cannot run this VAE; None if it can."""
    return next(_reasons(vae.decoder), None)


def _reasons(decoder: Any) -> Iterator[str]:
    for name, module in decoder.named_modules():
        if type(module) not in KNOWN:
            yield f"decoder.{name} is a {type(module).__name__}."
        elif isinstance(module, StockAttention):
            yield from attention_reasons(f"decoder.{name}", module)
        elif isinstance(module, nn.GroupNorm):
            yield from norm_reasons(f"decoder.{name}", module)
        elif isinstance(module, stock.HunyuanVideoCausalConv3d) and not _is_plain_conv(module):
            yield f"decoder.{name} is not a plain causal convolution."
        elif isinstance(module, stock.HunyuanVideoUpsampleCausal3D) and not _is_known_upsample(module):
            yield f"decoder.{name} upsamples by {module.upsample_factor}."
    yield from weights_reasons(decoder)


def _is_plain_conv(causal: Any) -> bool:
    conv = causal.conv
    size: int = conv.kernel_size[0]
    return (
        causal.pad_mode == "replicate"
        and size in (1, 3)
        and conv.kernel_size == (size,) * 3
        and causal.time_causal_padding == (size // 2,) * 4 + (size - 1, 0)
        and conv.stride == conv.dilation == (1, 1, 1)
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
        conv_in=take_causal_conv(decoder.conv_in.conv, kernels, Before.FIRST_FRAME, replicates=True),
        blocks=tuple(Block((step,)) for step in _take_steps(decoder, kernels)),
        norm_out=_take_norm(decoder.conv_norm_out),
        conv_out=take_causal_conv(decoder.conv_out.conv, kernels, Before.FIRST_FRAME, replicates=True),
        dtype=dtype,
        device=device,
    )


def _take_steps(decoder: Any, kernels: CausalKernels) -> Iterator[Step]:
    def resnet(block: Any) -> Step:
        shortcut = None if block.conv_shortcut is None else take_linear(block.conv_shortcut.conv)
        conv1, conv2 = (
            take_causal_conv(conv.conv, kernels, Before.FIRST_FRAME, replicates=True)
            for conv in (block.conv1, block.conv2)
        )
        return Resnet(_take_norm(block.norm1), conv1, _take_norm(block.norm2), conv2, shortcut)

    def upsample(upsampler: Any) -> CausalUpsample:
        times = int(upsampler.upsample_factor[0])
        return take_causal_upsample(upsampler.conv.conv, kernels, times=times, replicates=True)

    for step in take_steps(decoder, resnet, upsample):
        yield _over_frames(step) if isinstance(step, image.Attention) else step


def _over_frames(step: image.Attention) -> Attention:
    """Return an image's attention as one to all positions of a frame and of the frames before it."""
    norm = SpanNorm(step.norm, Span.VIDEO)
    return Attention(norm, step.query, step.key, step.value, step.bias, sees_past=True)


def _take_norm(norm: Any) -> SpanNorm:
    return SpanNorm(take_norm(norm), Span.VIDEO)
