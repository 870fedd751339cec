"""Has this VAE exactly the encoder that the passes compute? Judged by structure; anything unknown is a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D
from torch import nn

from server.engine.exact.structure import (
    children_reasons,
    conv_reasons,
    mid_block_reasons,
    norm_reasons,
    resnet_reasons,
    silu_reasons,
    weights_reasons,
)

PARTS = {"conv_in", "down_blocks", "mid_block", "conv_norm_out", "conv_act", "conv_out"}


def unsupported_reason(vae: nn.Module) -> str | None:
    return next(_reasons(vae), None)


def _reasons(vae: Any) -> Iterator[str]:
    if type(vae) is not AutoencoderKL:
        yield f"{type(vae).__name__} is not an AutoencoderKL."
        return
    encoder = vae.encoder
    if type(encoder) is not Encoder:
        yield f"Its encoder is a {type(encoder).__name__}."
        return
    if vae.quant_conv is not None:
        yield from conv_reasons("quant_conv", vae.quant_conv, 1)
    yield from children_reasons("encoder", encoder, PARTS)
    yield from conv_reasons("conv_in", encoder.conv_in, 3)
    yield from conv_reasons("conv_out", encoder.conv_out, 3)
    yield from norm_reasons("conv_norm_out", encoder.conv_norm_out)
    yield from silu_reasons("conv_act", encoder.conv_act)
    for index, block in enumerate(encoder.down_blocks):
        yield from _down_block(f"down_blocks.{index}", block)
    yield from mid_block_reasons(encoder.mid_block)
    yield from weights_reasons("encoder", encoder, vae.quant_conv)


def _down_block(name: str, block: Any) -> Iterator[str]:
    if type(block) is not DownEncoderBlock2D:
        yield f"{name} is a {type(block).__name__}."
        return
    for index, resnet in enumerate(block.resnets):
        yield from resnet_reasons(f"{name}.resnets.{index}", resnet)
    for downsampler in block.downsamplers or ():
        if type(downsampler) is not Downsample2D:
            yield f"{name} has a {type(downsampler).__name__}."
        elif not (downsampler.use_conv and downsampler.padding == 0 and downsampler.norm is None):
            yield f"{name} downsamples in an unknown way."
        else:
            yield from conv_reasons(f"{name}.downsampler", downsampler.conv, 3, stride=2)
    if len(block.downsamplers or ()) > 1:
        yield f"{name} downsamples more than once."
