"""The exact encoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux).

It computes the posterior that diffusers computes, band by band, with the kernels, layers and plans of the decoder.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ....values import Layout
from ..interface import Check, Coded, go_on
from ..layouts import Output
from .exact_coder import ExactCoder
from .layers import EncoderWeights
from .passes import encode
from .plan import Plan
from .structure import encoder_reason

__all__ = ["ExactKLEncoder"]


class ExactKLEncoder(ExactCoder[EncoderWeights]):
    """An encoder with the weights of an AutoencoderKL, its `quant_conv` included."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return None if this encoder can run the VAE, else one sentence that names the part it cannot run."""
        return encoder_reason(vae)

    def __init__(self, vae: AutoencoderKL) -> None:
        """Take the weights out of `vae.encoder` and `vae.quant_conv`: `vae.encode` no longer works afterwards.

        vae: a VAE for which `unsupported_reason` returns None, on its device, in the dtype to compute in.
        """
        super().__init__(vae.encoder.conv_in.weight, partial(EncoderWeights.take, vae))

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says. The parameters equal those of diffusers within the rounding of the dtype."""
        pixels = pixels.to(self.network.device, self.network.dtype)  # [B, 3, H, W]
        batch, _, height, width = pixels.shape
        return Coded(*self.compute(self.run, pixels, batch * height * width, budget_bytes, check))

    def run(self, plan: Plan, pixels: Tensor, check: Check = go_on) -> tuple[Tensor, Tensor]:  # [B, 3, H, W]
        """Run one encode as planned, without a CUDA graph.

        Return the posterior's parameters, and whether they are finite.
        """
        batch, _, height, width = pixels.shape
        ratio = self.network.downsampling
        shape = (batch, height // ratio, width // ratio, self.network.conv_out.out_channels)
        output = Output(Layout.SAMPLE, shape, pixels)
        for image in range(0, batch, plan.images):
            emit = partial(output.write, image)
            encode(self.network, self.kernels, plan, pixels[image : image + plan.images], emit, check)
        return output.tensor, output.finite
