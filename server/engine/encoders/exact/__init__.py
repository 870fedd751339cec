"""The exact encoder of AutoencoderKL (SD1, SD2, SDXL, SD3, Flux): the same posterior as diffusers, in row bands.

It is made of the exact decoder's kernels, layers and plan; here are an encoder's order of layers and its downsampling.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from server.engine.decoders.exact.graphs import GRAPH_PIXELS, GRAPHS, Graphs
from server.engine.decoders.exact.memory import free_bytes, kernels_for
from server.engine.decoders.exact.output import Output
from server.engine.decoders.exact.plan import Plan, fit, footprint, wanted
from server.engine.encoders.exact.network import Network
from server.engine.encoders.exact.passes import encode
from server.engine.encoders.exact.structure import unsupported_reason
from server.types import Layout

__all__ = ["ExactKLEncoder"]


class ExactKLEncoder:
    """Takes over the weights of `vae.encoder` and `vae.quant_conv`; `vae.encode` no longer works after.

    The weights are already on their device in the dtype to compute in. `memory_budget_bytes` bounds the activations'
    peak; None takes it from the memory that is free at each encode.
    """

    name = "exact"

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """None if this encoder's structure is known, else one sentence saying what is not."""
        return unsupported_reason(vae)

    def __init__(self, vae: AutoencoderKL, *, memory_budget_bytes: int | None = None) -> None:
        weight = vae.encoder.conv_in.weight
        self.memory_budget_bytes = memory_budget_bytes
        self.kernels = kernels_for(weight.device, weight.dtype)
        self.network = Network.take(vae, self.kernels)
        self.graphs = Graphs(GRAPHS) if weight.device.type == "cuda" else None
        self.finite = torch.ones((), dtype=torch.bool)

    def plan(self, batch: int, height: int, width: int) -> Plan:
        """For pictures of height x width."""
        need = footprint(self.network, height, width)
        budget = self.memory_budget_bytes
        free = free_bytes(self.network.device) if budget is None else budget
        return fit(need, wanted(need, batch, self.network), free)

    def peak_bytes(self, batch: int, height: int, width: int) -> int:
        """An estimate of the activations' peak for pictures of height x width, without encoding."""
        return footprint(self.network, height, width).peak(self.plan(batch, height, width))

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
