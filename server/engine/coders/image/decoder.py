"""The exact decoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux).

It computes the image that diffusers computes, band by band, so that it needs less memory and time.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ....values import Layout
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from .exact_coder import ExactCoder
from .layers import DecoderWeights
from .passes import decode
from .plan import Plan
from .structure import decoder_reason


class ExactKLDecoder(ExactCoder[DecoderWeights]):
    """A decoder with the weights of an AutoencoderKL, its `post_quant_conv` included."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return None if this decoder can run the VAE, else one sentence that names the part it cannot run."""
        return decoder_reason(vae)

    def __init__(self, vae: AutoencoderKL) -> None:
        """Take the weights out of `vae.decoder` and `vae.post_quant_conv`: `vae.decode` no longer works afterwards.

        vae: a VAE for which `unsupported_reason` returns None, on its device, in the dtype to compute in.
        """
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
        """Decode as `Decoder.decode` says.

        The result equals that of diffusers' `decode` within the rounding of the dtype.
        """
        latents = latents.to(self.network.device, self.network.dtype)  # [B, C, h, w]
        batch, _, height, width = latents.shape
        pixels = batch * height * width * self.network.upsampling**2
        image, finite = self.compute(partial(self.run, layout=layout), latents, pixels, budget_bytes, check, layout)
        if emit is not None:
            emit(image, finite)
        return Coded(image, finite)

    def run(
        self, plan: Plan, latents: Tensor, check: Check = go_on, *, layout: Layout
    ) -> tuple[Tensor, Tensor]:  # [B, C, h, w]
        """Run one decode as planned, without a CUDA graph. Return the image in `layout`, and whether it is finite."""
        batch, _, height, width = latents.shape
        ratio = self.network.upsampling
        output = Output(layout, (batch, ratio * height, ratio * width, self.network.conv_out.out_channels), latents)
        for image in range(0, batch, plan.images):
            emit = partial(output.write, image)
            decode(self.network, self.kernels, plan, latents[image : image + plan.images], emit, check)
        return output.tensor, output.finite
