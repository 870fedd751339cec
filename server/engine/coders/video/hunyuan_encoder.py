"""The exact encoder of AutoencoderKLHunyuanVideo: diffusers' untiled encode, computed in chunks of frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock
from torch import Tensor, nn

from ....model_info import EXACT
from ....values import Layout
from ...kernels.choice import kernels_for
from ...kernels.reference import Kernels
from ..image.layers import Conv, fold_quant, take_linear, take_mid_block, take_norm
from ..interface import Check, Coded, go_on
from ..layouts import Output
from . import hunyuan_passes as passes
from .hunyuan_decoder import (
    QUERY_BYTES,
    chunk_bytes_within,
    part_reasons,
    side_by_side,
    take_causal_weights,
    take_conv,
    take_resnet,
)


class ExactHunyuanVideoEncoder:
    """An encoder with the weights of an AutoencoderKLHunyuanVideo, its `quant_conv` included.

    It computes what diffusers computes with `use_framewise_encoding` off: no temporal tiles, no blending, and no mask
    over pairs of positions. Two whole activations are always stored. The memory budget limits only the chunks beside
    them.
    """

    name = EXACT
    heeds_budget = True

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return None if this encoder can run the VAE, else one sentence that names the part it cannot run."""
        return next(_reasons(vae), None)

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        """Take the weights out of `vae.encoder` and `vae.quant_conv`: `vae.encode` no longer works afterwards."""
        weight = vae.encoder.conv_in.conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.kernels = kernels_for(self.device, self.dtype)
        self.network = _take(vae, self.kernels)

    def free_caches(self) -> None:
        """Do nothing, because this encoder caches nothing between calls."""

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode `[B, 3, F, H, W]` as `Encoder.encode` says.

        The parameters equal those of diffusers' untiled `encode` within the rounding of the dtype.
        """
        pixels = pixels.to(self.device, self.dtype)
        batch, _, frames, height, width = pixels.shape
        widest = frames * height * width * self.network.conv_in.out_channels
        chunk_bytes = chunk_bytes_within(widest * self.dtype.itemsize, self.device, budget_bytes)
        for step in self.network.steps:
            if isinstance(step, passes.Downsample):
                height, width = -(-height // 2), -(-width // 2)
                frames = -(-frames // 2) if step.shrinks_in_time else frames
        output = Output(Layout.SAMPLE, (batch * frames, height, width, self.network.conv_out.out_channels), pixels)
        for index, one in enumerate(pixels):  # [3, F, H, W]

            def write(frame: int, parameters: Tensor, start: int = index * frames) -> None:
                output.write(start + frame, 0, parameters)

            passes.encode(self.network, self.kernels, chunk_bytes, QUERY_BYTES, one, write, check)
        parameters = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, 2 C, f, h, w]
        return Coded(parameters, output.finite)


def _take(vae: Any, kernels: Kernels) -> passes.VideoEncoderWeights:
    encoder = vae.encoder
    return passes.VideoEncoderWeights(
        conv_in=take_conv(encoder.conv_in, kernels),
        steps=tuple(_take_steps(encoder, kernels)),
        norm_out=take_norm(encoder.conv_norm_out),
        conv_out=_take_conv_out(encoder.conv_out, vae.quant_conv, kernels),
    )


def _take_steps(encoder: Any, kernels: Kernels) -> Iterator[passes.EncoderStep]:
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield take_resnet(resnet, kernels)
        for downsampler in block.downsamplers or ():
            shrinks_in_time = downsampler.conv.conv.stride[0] == 2
            yield passes.Downsample(take_conv(downsampler.conv, kernels), shrinks_in_time)
    yield from take_mid_block(encoder.mid_block, lambda resnet: take_resnet(resnet, kernels))


def _take_conv_out(causal: Any, quant_conv: Any, kernels: Kernels) -> Conv:
    weight, bias = take_causal_weights(causal)  # [I, C, 3, 3, 3], [I]
    weight, bias = fold_quant(side_by_side(weight), bias, take_linear(quant_conv))  # [O, 3 C, 3, 3], [O]
    return Conv(kernels.pack(weight), bias, len(bias))


def _reasons(vae: Any) -> Iterator[str]:
    if type(vae) is not AutoencoderKLHunyuanVideo:
        yield f"{type(vae).__name__} is not an AutoencoderKLHunyuanVideo."
        return
    own = {stock.HunyuanVideoEncoder3D, stock.HunyuanVideoDownBlock3D, stock.HunyuanVideoDownsampleCausal3D}
    yield from part_reasons("encoder", vae.encoder, own)
