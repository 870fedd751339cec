"""The exact decoder of causal video VAEs with per-pixel norms: diffusers' own result, one chunk of frames at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....model_info import EXACT
from ....values import Layout
from ...kernels.causal_kernels import CausalKernels
from ...kernels.choice import kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from . import hunyuan_video_15_layers, wan_layers
from .causal_passes import Past, Run, decode_head, decode_tail
from .causal_plan import Plan, fit, halo_rows, held_bytes

CPU_BAND_BYTES = 4 << 20
GPU_BAND_BYTES = 1 << 30
QUERY_BYTES = 256 << 20
STRUCTURES = {
    **dict.fromkeys(wan_layers.PREFIXES, wan_layers),
    hunyuan_video_15_layers.NAME: hunyuan_video_15_layers,
}
CAUSAL_CLASSES = frozenset(STRUCTURES)


class ExactCausalDecoder:
    """Takes over the weights of a VAE's decoder; `vae.decode` no longer works afterwards."""

    name = EXACT
    heeds_budget = True

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this decoder cannot run a VAE; None if it can."""
        structure = STRUCTURES.get(type(vae).__name__)
        if structure is None:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(CAUSAL_CLASSES))}."
        reason: str | None = structure.decoder_reason(vae)
        return reason

    def __init__(self, vae: Any) -> None:
        weight = next(vae.decoder.parameters())
        self.kernels = CausalKernels(kernels_for(weight.device, weight.dtype))
        self.weights = STRUCTURES[type(vae).__name__].take_decoder(vae, self.kernels)

    def free_caches(self) -> None:
        """Do nothing, because this decoder caches nothing between calls."""

    def plan(self, height: int, width: int, budget_bytes: int) -> Plan:
        """Plan a decode of latents of this size. budget_bytes: the memory limit of everything but the output."""
        band_bytes = CPU_BAND_BYTES if self.weights.device.type == "cpu" else GPU_BAND_BYTES
        return fit(held_bytes(self.weights, height, width), height, budget_bytes, band_bytes)

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # [B, C, F, h, w], or [B, C, h, w] for a family of images
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says; equals diffusers' `decode` within the dtype's rounding."""
        weights = self.weights
        latents = latents.to(weights.device, weights.dtype)
        videos = latents if latents.ndim == 5 else latents[:, :, None]  # [B, C, F, h, w]
        batch, _, latent_frames, height, width = videos.shape
        ratio = weights.spatial_ratio()
        frames = (latent_frames - 1) * weights.temporal_ratio() + 1
        channels = weights.conv_out.out_channels // weights.patch**2
        output = Output(layout, (batch * frames, ratio * height, ratio * width, channels), videos)
        budget = free_bytes(weights.device) - output.tensor.nbytes if budget_bytes is None else budget_bytes
        budget -= latent_frames * height * width * weights.head_channels * weights.dtype.itemsize
        plan = self.plan(height, width, budget)
        run = Run(self.kernels, plan.band_bytes, QUERY_BYTES, check)
        for index, video in enumerate(videos.permute(0, 2, 3, 4, 1).contiguous()):  # [F, h, w, C]
            self._decode(run, video, output, index * frames, plan.slab_rows, emit)
        if layout is not Layout.SAMPLE or latents.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)

    def _decode(
        self, run: Run, video: Tensor, output: Output, first: int, slab: int, emit: Emit | None
    ) -> None:  # [F, h, w, C]
        """Decode one video to the frames from `first` on. slab: the latent rows that are decoded together."""
        weights, height = self.weights, video.shape[1]
        halo, ratio = halo_rows(weights), weights.spatial_ratio()
        past = Past()
        heads = (decode_head(weights, run, past, chunk) for chunk in torch.split(video, 1))  # [1, h, w, C'] each
        chunks = heads if slab >= height else list(heads)
        for top in range(0, height, slab):
            bottom = min(top + slab, height)
            above, below = max(top - halo, 0), min(bottom + halo, height)
            frame, tail_past = first, Past()
            for chunk in chunks:
                x = chunk if slab >= height else chunk[:, above:below].clone()
                sample = decode_tail(weights, run, tail_past, x)  # [n, H, W, 3]
                inner = sample[:, ratio * (top - above) : ratio * (bottom - above)]
                output.write(frame, ratio * top, inner)
                if emit is not None and bottom == height:
                    emit(output.tensor[frame : frame + len(sample)])
                frame += len(sample)
