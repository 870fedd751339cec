"""The exact encoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux): the same posterior as diffusers, in row bands.

Kernels, layers and plan are the decoder's too; here are an encoder's order of layers and its downsampling.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from server.engine.exact.encoder.network import Network
from server.engine.exact.encoder.passes import encode
from server.engine.exact.encoder.structure import unsupported_reason
from server.engine.exact.graphs import GRAPH_PIXELS
from server.engine.exact.half import ExactHalf
from server.engine.exact.output import Output
from server.engine.exact.plan import Plan
from server.types import Layout

__all__ = ["ExactKLEncoder"]


class ExactKLEncoder(ExactHalf[Network]):
    """Takes over the weights of `vae.encoder` and `vae.quant_conv`; `vae.encode` no longer works after."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """None if this encoder's structure is known, else one sentence saying what is not."""
        return unsupported_reason(vae)

    def __init__(self, vae: AutoencoderKL, *, memory_budget_bytes: int | None = None) -> None:
        super().__init__(vae.encoder.conv_in.weight, partial(Network.take, vae), memory_budget_bytes)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1] to the posterior's parameters `[B, 2 C, h, w]`, in the weights' dtype.

        They equal diffusers' `vae.encode(pixels).latent_dist.parameters` within the dtype's rounding.
        """
        pixels = pixels.to(self.network.device, self.network.dtype)  # [B, 3, H, W]
        batch, _, height, width = pixels.shape
        plan = self.plan(batch, height, width)
        if self.graphs is None or batch * height * width > GRAPH_PIXELS:
            parameters, self.finite = self.run(plan, pixels)
        else:
            parameters, self.finite = self.graphs.run((pixels.shape, plan), partial(self.run, plan), pixels)
        return parameters

    def run(self, plan: Plan, pixels: Tensor) -> tuple[Tensor, Tensor]:  # [B, 3, H, W]
        """One encode as planned, launched operation by operation: the parameters, and whether they are finite."""
        batch, _, height, width = pixels.shape
        ratio = self.network.downsampling
        shape = (batch, height // ratio, width // ratio, self.network.conv_out.out_channels)
        output = Output(Layout.SAMPLE, shape, pixels)
        for image in range(0, batch, plan.images):
            emit = partial(output.write, image)
            encode(self.network, self.kernels, plan, pixels[image : image + plan.images], emit)
        return output.tensor, output.finite
