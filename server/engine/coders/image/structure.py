"""Check that a VAE has exactly the layers that the exact decoder and encoder compute.

The check goes through the modules one by one. For a VAE with anything unknown, the server runs diffusers' own coder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

CLASSES = frozenset({"AutoencoderKL", "AutoencoderKLFlux2"})
"""Classes whose decode is `decoder(post_quant_conv(z))`, and whose encode is `quant_conv(encoder(x))`."""

ENDS = {"conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out"}


def decoder_reason(vae: nn.Module) -> str | None:
    """Return the first reason why the exact decoder cannot run this VAE; None if it can."""
    return next(_decoder_reasons(vae), None)


def encoder_reason(vae: nn.Module) -> str | None:
    """Return the first reason why the exact encoder cannot run this VAE; None if it can."""
    return next(_encoder_reasons(vae), None)


def _decoder_reasons(vae: Any) -> Iterator[str]:
    if type(vae).__name__ not in CLASSES:
        yield f"{type(vae).__name__} is not one of {', '.join(sorted(CLASSES))}."
        return
    yield from _ends_reasons("decoder", vae.decoder, Decoder, vae.post_quant_conv, "up_blocks")
    if type(vae.decoder) is Decoder:
        for index, block in enumerate(vae.decoder.up_blocks):
            yield from _up_block(f"up_blocks.{index}", block)


def _encoder_reasons(vae: Any) -> Iterator[str]:
    if type(vae).__name__ not in CLASSES:
        yield f"{type(vae).__name__} is not one of {', '.join(sorted(CLASSES))}."
        return
    yield from _ends_reasons("encoder", vae.encoder, Encoder, vae.quant_conv, "down_blocks")
    if type(vae.encoder) is Encoder:
        for index, block in enumerate(vae.encoder.down_blocks):
            yield from _down_block(f"down_blocks.{index}", block)


def _ends_reasons(name: str, part: Any, known: type[nn.Module], quant: Any, blocks: str) -> Iterator[str]:
    """Check a decoder or encoder except its up or down blocks.

    known: its expected class. quant: the 1x1 (post_)quant_conv of the VAE, or None. blocks: the name of its blocks.
    """
    if type(part) is not known:
        yield f"Its {name} is a {type(part).__name__}."
        return
    if quant is not None:
        yield from conv_reasons("the quantisation convolution", quant, 1)
    yield from children_reasons(name, part, ENDS | {blocks})
    yield from conv_reasons("conv_in", part.conv_in, 3)
    yield from conv_reasons("conv_out", part.conv_out, 3)
    yield from norm_reasons("conv_norm_out", part.conv_norm_out)
    yield from silu_reasons("conv_act", part.conv_act)
    yield from mid_block_reasons(part.mid_block)
    yield from weights_reasons(name, part, quant)


def weights_reasons(name: str, *modules: nn.Module | None) -> Iterator[str]:
    """Check that all weights of the modules have one device and one dtype, which is float32, bfloat16 or float16."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) != 1:
        yield f"Its {name}'s weights are in more than one dtype or on more than one device."
    elif parameters[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield f"Its weights are {parameters[0].dtype}."


def mid_block_reasons(block: Any) -> Iterator[str]:
    """Check that a mid block is a known `UNetMidBlock2D`."""
    if type(block) is not UNetMidBlock2D:
        yield f"mid_block is a {type(block).__name__}."
        return
    if len(block.resnets) != len(block.attentions) + 1:
        yield "mid_block does not alternate resnets and attentions."
    for index, resnet in enumerate(block.resnets):
        yield from resnet_reasons(f"mid_block.resnets.{index}", resnet)
    for index, attention in enumerate(block.attentions):
        if attention is not None:
            yield from attention_reasons(f"mid_block.attentions.{index}", attention)


def _up_block(name: str, block: Any) -> Iterator[str]:
    if type(block) is not UpDecoderBlock2D:
        yield f"{name} is a {type(block).__name__}."
        return
    yield from _resnets(name, block.resnets)
    for upsampler in block.upsamplers or ():
        if type(upsampler) is not Upsample2D:
            yield f"{name} has a {type(upsampler).__name__}."
        elif not (upsampler.use_conv and upsampler.interpolate and upsampler.name == "conv" and upsampler.norm is None):
            yield f"{name} upsamples in an unknown way."
        else:
            yield from conv_reasons(f"{name}.upsampler", upsampler.conv, 3)
    if len(block.upsamplers or ()) > 1:
        yield f"{name} upsamples more than once."


def _down_block(name: str, block: Any) -> Iterator[str]:
    if type(block) is not DownEncoderBlock2D:
        yield f"{name} is a {type(block).__name__}."
        return
    yield from _resnets(name, block.resnets)
    for downsampler in block.downsamplers or ():
        if type(downsampler) is not Downsample2D:
            yield f"{name} has a {type(downsampler).__name__}."
        elif not (downsampler.use_conv and downsampler.padding == 0 and downsampler.norm is None):
            yield f"{name} downsamples in an unknown way."
        else:
            yield from conv_reasons(f"{name}.downsampler", downsampler.conv, 3, stride=2)
    if len(block.downsamplers or ()) > 1:
        yield f"{name} downsamples more than once."


def _resnets(name: str, resnets: Any) -> Iterator[str]:
    for index, resnet in enumerate(resnets):
        yield from resnet_reasons(f"{name}.resnets.{index}", resnet)


def resnet_reasons(name: str, resnet: Any) -> Iterator[str]:
    """Check that a residual block computes what `layers.Resnet` says."""
    if type(resnet) is not ResnetBlock2D:
        yield f"{name} is a {type(resnet).__name__}."
        return
    plain = (
        resnet.time_emb_proj is None
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.time_embedding_norm in ("default", "group")  # without a time embedding both are the same
        and resnet.output_scale_factor == 1
        and (resnet.dropout.p == 0 or not resnet.training)
    )
    if not plain:
        yield f"{name} has a time embedding, resampling, an output scale or dropout."
    yield from norm_reasons(f"{name}.norm1", resnet.norm1)
    yield from norm_reasons(f"{name}.norm2", resnet.norm2)
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    yield from conv_reasons(f"{name}.conv1", resnet.conv1, 3)
    yield from conv_reasons(f"{name}.conv2", resnet.conv2, 3)
    if resnet.conv_shortcut is not None:
        yield from conv_reasons(f"{name}.conv_shortcut", resnet.conv_shortcut, 1)


def attention_reasons(name: str, attention: Any) -> Iterator[str]:
    """Check that an attention computes what `layers.Attention` says."""
    if type(attention) is not Attention or type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        yield f"{name} is not diffusers' plain attention."
        return
    plain = (
        attention.heads == 1
        and attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and attention.added_kv_proj_dim is None
        and not attention.is_causal
        and attention.scale == attention.inner_dim**-0.5
    )
    if not plain:
        yield f"{name} is not single-head residual self-attention."
    yield from norm_reasons(f"{name}.group_norm", attention.group_norm)
    for part in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        if type(part) is not nn.Linear:
            yield f"{name} projects with a {type(part).__name__}."


def conv_reasons(name: str, conv: Any, kernel: int, stride: int = 1) -> Iterator[str]:
    """Check that a convolution is a plain `Conv2d` with this kernel size and stride."""
    padding = kernel // 2 if stride == 1 else 0  # Downsample2D itself pads, on the right and at the bottom
    known = (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (kernel, kernel)
        and conv.padding == (padding, padding)
        and conv.stride == (stride, stride)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
    if not known:
        yield f"{name} is not a plain {kernel}x{kernel} convolution of stride {stride}."


def norm_reasons(name: str, norm: Any) -> Iterator[str]:
    """Check that a norm is an affine `GroupNorm`."""
    if type(norm) is not nn.GroupNorm or not norm.affine:
        yield f"{name} is not an affine GroupNorm."


def silu_reasons(name: str, activation: Any) -> Iterator[str]:
    """Check that an activation function is `SiLU`."""
    if type(activation) is not nn.SiLU:
        yield f"{name} is a {type(activation).__name__}, not SiLU."


def children_reasons(name: str, module: Any, known: set[str]) -> Iterator[str]:
    """Check that a module has no children beside the known names."""
    unknown = {child for child, _ in module.named_children()} - known
    if unknown:
        yield f"{name} has unknown parts: {', '.join(sorted(unknown))}."
