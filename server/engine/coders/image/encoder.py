"""The exact encoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux): the same posterior as diffusers, in row bands.

Kernels, layers and plan are the decoder's too; here are an encoder's order of layers and its downsampling.
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
from .graphs import GRAPH_PIXELS
from .layers import EncoderWeights
from .passes import encode
from .plan import Plan
from .structure import encoder_reason

__all__ = ["ExactKLEncoder"]


class ExactKLEncoder(ExactCoder[EncoderWeights]):
    """Takes over the weights of `vae.encoder` and `vae.quant_conv`; `vae.encode` no longer works after."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """None if this encoder's structure is known, else one sentence saying what is not."""
        return encoder_reason(vae)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(vae.encoder.conv_in.weight, partial(EncoderWeights.take, vae))

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says; equals diffusers' parameters within the dtype's rounding."""
        pixels = pixels.to(self.network.device, self.network.dtype)  # [B, 3, H, W]
        batch, _, height, width = pixels.shape
        plan = self.plan(batch, height, width, budget_bytes)
        if self.graphs is None or batch * height * width > GRAPH_PIXELS:
            return Coded(*self.run(plan, pixels, check))
        # One step: nothing can be done while a graph is recorded or replayed.
        return Coded(*self.graphs.run((pixels.shape, plan), partial(self.run, plan, check=go_on), pixels))

    def run(self, plan: Plan, pixels: Tensor, check: Check = go_on) -> tuple[Tensor, Tensor]:  # [B, 3, H, W]
        """Run one encode as planned, operation by operation. Returns the parameters, and whether they are finite."""
        batch, _, height, width = pixels.shape
        ratio = self.network.downsampling
        shape = (batch, height // ratio, width // ratio, self.network.conv_out.out_channels)
        output = Output(Layout.SAMPLE, shape, pixels)
        for image in range(0, batch, plan.images):
            emit = partial(output.write, image)
            encode(self.network, self.kernels, plan, pixels[image : image + plan.images], emit, check)
        return output.tensor, output.finite
