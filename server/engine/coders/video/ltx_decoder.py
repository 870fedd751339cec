"""The exact decoder of LTX-Video and LTX-2: diffusers' own result, one chunk of frames at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....errors import WrongShape
from ....model_info import EXACT
from ....values import Layout
from ...kernels.choice import causal_kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from . import ltx_layers
from .causal_coder import CPU_BAND_BYTES, GPU_BAND_BYTES
from .causal_passes import Run
from .ltx_layers import FramesDecoder
from .ltx_passes import decode_frames
from .ltx_plan import Plan, fit, halo_rows

CPU_CHUNK_BYTES = 16 << 20  # measured: 8 to 64 MiB are equally fast
GPU_CHUNK_BYTES = 1 << 30
LTX_CLASSES = frozenset(ltx_layers.PREFIXES)


class ExactLTXDecoder:
    """Takes over the weights of a VAE's decoder; `vae.decode` no longer works afterwards."""

    name = EXACT
    heeds_budget = True

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this decoder cannot run a VAE; None if it can."""
        if type(vae).__name__ not in LTX_CLASSES:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(LTX_CLASSES))}."
        return ltx_layers.decoder_reason(vae)

    def __init__(self, vae: Any) -> None:
        weight = next(vae.decoder.parameters())
        self.kernels = causal_kernels_for(weight.device, weight.dtype)
        self.weights = ltx_layers.take_decoder(vae, self.kernels)

    def free_caches(self) -> None:
        """Do nothing, because this decoder caches nothing between calls."""

    def plan(self, frames: int, height: int, width: int, budget_bytes: int) -> Plan:
        """Plan a decode of latents of this size. budget_bytes: the memory limit of everything but the output."""
        is_cpu = self.weights.device.type == "cpu"
        chunk_bytes, band_bytes = (CPU_CHUNK_BYTES, CPU_BAND_BYTES) if is_cpu else (GPU_CHUNK_BYTES, GPU_BAND_BYTES)
        return fit(self.weights, (frames, height, width), budget_bytes, chunk_bytes, band_bytes)

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # [B, C, F, h, w]
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says; equals diffusers' `decode` within the dtype's rounding.

        arguments: `timestep`, for a VAE that takes one. Raises WrongShape for latents that the VAE cannot pad.
        """
        weights = self.weights
        batch, _, latent_frames, height, width = latents.shape
        if weights.mirrors and min(height, width) < 2:
            raise WrongShape(
                "this VAE mirrors the frames at their edges, which takes latents of at least 2x2; send larger ones"
            )
        videos = latents.to(weights.device, weights.dtype).permute(0, 2, 3, 4, 1).contiguous()  # [B, F, h, w, C]
        frames, ratio = (latent_frames - 1) * weights.temporal_ratio() + 1, weights.spatial_ratio()
        free = free_bytes(weights.device)
        output = Output(layout, (batch * frames, ratio * height, ratio * width, weights.channels), videos)
        budget = free - output.tensor.nbytes if budget_bytes is None else budget_bytes
        plan = self.plan(latent_frames, height, width, budget)
        run = Run(self.kernels, plan.band_bytes, 0, check)
        decoder = weights.at(arguments.get("timestep", 0.0))
        for index, video in enumerate(videos):  # [F, h, w, C]
            _decode(decoder, run, plan, video, output, index * frames, emit)
        if layout is not Layout.SAMPLE:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)


def _decode(
    decoder: FramesDecoder, run: Run, plan: Plan, video: Tensor, output: Output, first: int, emit: Emit | None
) -> None:  # [F, h, w, C]
    """Decode one video to the frames from `first` on."""
    height, halo, ratio = video.shape[1], halo_rows(decoder), decoder.spatial_ratio()
    for top in range(0, height, plan.slab_rows):
        bottom = min(top + plan.slab_rows, height)
        above, below = max(top - halo, 0), min(bottom + halo, height)
        frame = first
        for sample in decode_frames(decoder, run, plan.chunk_bytes, video[:, above:below]):  # [n, H, W, 3]
            output.write(frame, ratio * top, sample[:, ratio * (top - above) : ratio * (bottom - above)])
            if emit is not None and bottom == height:
                emit(output.tensor[frame : frame + len(sample)], output.finite)
            frame += len(sample)
