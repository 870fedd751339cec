"""The exact encoder of causal video VAEs with per-pixel norms: diffusers' own result, one chunk of frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ....model_info import EXACT
from ....values import Layout
from ...kernels.causal_kernels import CausalKernels
from ...kernels.choice import kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, go_on
from ..layouts import Output
from .causal_decoder import CAUSAL_CLASSES, CPU_BAND_BYTES, GPU_BAND_BYTES, QUERY_BYTES, STRUCTURES
from .causal_encoder_plan import halo_rows, held_bytes
from .causal_encoding import encode_back, encode_front, patches
from .causal_passes import Past, Run
from .causal_plan import Plan, fit


class ExactCausalEncoder:
    """Takes over the weights of a VAE's encoder; `vae.encode` no longer works afterwards."""

    name = EXACT
    heeds_budget = True

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this encoder cannot run a VAE; None if it can."""
        structure = STRUCTURES.get(type(vae).__name__)
        if structure is None:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(CAUSAL_CLASSES))}."
        reason: str | None = structure.encoder_reason(vae)
        return reason

    def __init__(self, vae: Any) -> None:
        weight = next(vae.encoder.parameters())
        self.kernels = CausalKernels(kernels_for(weight.device, weight.dtype))
        self.weights = STRUCTURES[type(vae).__name__].take_encoder(vae, self.kernels)

    def free_caches(self) -> None:
        """Do nothing, because this encoder caches nothing between calls."""

    def plan(self, chunks: int, height: int, width: int, budget_bytes: int) -> Plan:
        """Plan an encode to so many latent frames whose front's output has this size.

        budget_bytes: the memory limit of everything but the output.
        """
        band_bytes = CPU_BAND_BYTES if self.weights.device.type == "cpu" else GPU_BAND_BYTES
        return fit(held_bytes(self.weights, chunks, height, width), height, budget_bytes, band_bytes)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says. The parameters equal those of diffusers within the rounding of the dtype.

        As in diffusers, frames at the end that do not fill a chunk are ignored.
        """
        weights = self.weights
        videos = pixels if pixels.ndim == 5 else pixels[:, :, None]  # [B, C, F, H, W]
        batch, _, frames, height, width = videos.shape
        chunks, ratio = (frames - 1) // weights.chunk_frames, weights.spatial_ratio()
        latent_frames = 1 + chunks * weights.chunk_frames // weights.temporal_ratio()
        shape = (batch * latent_frames, height // ratio, width // ratio, weights.channels)
        like = torch.empty(0, dtype=weights.dtype, device=weights.device)
        output = Output(Layout.SAMPLE, shape, like)
        budget = free_bytes(weights.device) - output.tensor.nbytes if budget_bytes is None else budget_bytes
        front = weights.front_ratio()
        plan = self.plan(latent_frames, height // front, width // front, budget)
        run = Run(self.kernels, plan.band_bytes, QUERY_BYTES, check)
        for index, video in enumerate(videos):  # [C, F, H, W]
            past, first = Past(), index * latent_frames
            for x in self._fronts(run, video, plan.slab_rows):  # [n, h, w, C]
                parameters = encode_back(weights, run, past, x)  # [n, h', w', 2 C']
                output.write(first, 0, parameters)
                first += len(parameters)
        if pixels.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B, 2 C', h', w']
        parameters = output.tensor.view(batch, latent_frames, *output.tensor.shape[1:]).transpose(1, 2)
        return Coded(parameters, output.finite)  # [B, 2 C', f, h', w']

    def _fronts(self, run: Run, video: Tensor, slab: int) -> Iterator[Tensor]:  # [C, F, H, W]
        """Yield the front's output for each chunk of frames. slab: the rows of it that are computed together."""
        weights, ratio = self.weights, self.weights.front_ratio()
        height = video.shape[2] // ratio
        if slab >= height:
            yield from self._rows(run, video, 0, height)
            return
        whole: list[Tensor] = []  # for each chunk, [n, h, w, C]
        halo = halo_rows(weights)
        for top in range(0, height, slab):
            bottom = min(top + slab, height)
            above, below = max(top - halo, 0), min(bottom + halo, height)
            for index, x in enumerate(self._rows(run, video, above, below)):  # [n, r, w, C]
                if top == 0:
                    whole.append(x.new_empty(len(x), height, *x.shape[2:]))
                whole[index][:, top:bottom] = x[:, top - above : bottom - above]
        whole.reverse()
        while whole:
            yield whole.pop()

    def _rows(self, run: Run, video: Tensor, top: int, bottom: int) -> Iterator[Tensor]:  # [C, F, H, W]
        """Yield rows [top, bottom) of the front's output, `[n, bottom - top, w, C]`, for each chunk of frames."""
        weights, ratio, past = self.weights, self.weights.front_ratio(), Past()
        rows = video[:, :, ratio * top : ratio * bottom]  # [C, F, R, W]
        starts = range(1, video.shape[1] - weights.chunk_frames + 1, weights.chunk_frames)
        for chunk in (slice(1), *(slice(start, start + weights.chunk_frames) for start in starts)):
            frames = rows[:, chunk].to(weights.device, weights.dtype).permute(1, 2, 3, 0)  # [n, R, W, C]
            yield encode_front(weights, run, past, patches(frames.contiguous(), weights.patch))
