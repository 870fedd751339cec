"""The exact decoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux): the same picture as diffusers, in row bands."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ....values import Layout
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from .exact_coder import ExactCoder
from .graphs import GRAPH_PIXELS
from .layers import DecoderWeights
from .passes import decode
from .plan import Plan
from .structure import decoder_reason


class ExactKLDecoder(ExactCoder[DecoderWeights]):
    """Takes over the weights of `vae.decoder` and `vae.post_quant_conv`; `vae.decode` no longer works after."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """None if this decoder's structure is known, else one sentence saying what is not."""
        return decoder_reason(vae)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(vae.decoder.conv_in.weight, partial(DecoderWeights.take, vae))

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says; equals diffusers' `decode` within the dtype's rounding."""
        latents = latents.to(self.network.device, self.network.dtype)  # [B, C, h, w]
        batch, _, height, width = latents.shape
        plan = self.plan(batch, height, width, budget_bytes)
        if self.graphs is None or batch * height * width * self.network.upsampling**2 > GRAPH_PIXELS:
            image, finite = self.run(plan, latents, layout, check)
        else:  # one step: nothing can be done while a graph is recorded or replayed
            launch = partial(self.run, plan, layout=layout, check=go_on)
            image, finite = self.graphs.run((latents.shape, layout, plan), launch, latents)
        if emit is not None:
            emit(image)
        return Coded(image, finite)

    def run(
        self, plan: Plan, latents: Tensor, layout: Layout, check: Check = go_on
    ) -> tuple[Tensor, Tensor]:  # [B, C, h, w]
        """Run one decode as planned, operation by operation. Returns the image, and whether it is finite."""
        batch, _, height, width = latents.shape
        ratio = self.network.upsampling
        output = Output(layout, (batch, ratio * height, ratio * width, self.network.conv_out.out_channels), latents)
        for image in range(0, batch, plan.images):
            emit = partial(output.write, image)
            decode(self.network, self.kernels, plan, latents[image : image + plan.images], emit, check)
        return output.tensor, output.finite
