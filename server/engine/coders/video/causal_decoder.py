"""The exact decoder of causal video VAEs: diffusers' own result, one chunk of frames at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....values import Layout
from ...kernels.choice import causal_kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from . import cogvideox_layers, hunyuan_video_15_layers, hunyuan_video_layers, magvit_layers, mochi_layers, wan_layers
from .causal_coder import CausalCoder
from .causal_layers import CausalDecoder
from .causal_run import Piece, Write
from .causal_stages import State
from .causal_statistics import Place

STRUCTURES = {
    **dict.fromkeys(wan_layers.PREFIXES, wan_layers),
    hunyuan_video_15_layers.NAME: hunyuan_video_15_layers,
    hunyuan_video_layers.NAME: hunyuan_video_layers,
    cogvideox_layers.NAME: cogvideox_layers,
    mochi_layers.NAME: mochi_layers,
    magvit_layers.NAME: magvit_layers,
}
DECODED_CLASSES = frozenset(STRUCTURES)


class ExactCausalDecoder(CausalCoder):
    """Takes over the weights of a VAE's decoder; `vae.decode` no longer works afterwards."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this decoder cannot run a VAE; None if it can."""
        structure = STRUCTURES.get(type(vae).__name__)
        if structure is None:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(DECODED_CLASSES))}."
        reason: str | None = structure.decoder_reason(vae)
        return reason

    def __init__(self, vae: Any) -> None:
        weight = next(vae.decoder.parameters())
        kernels = causal_kernels_for(weight.device, weight.dtype)
        self.weights: CausalDecoder = STRUCTURES[type(vae).__name__].take_decoder(vae, kernels)
        super().__init__(self.weights, kernels)

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
        """Decode as `Decoder.decode` says; equals diffusers' `decode` within the dtype's rounding.

        arguments: ignored.
        """
        weights = self.weights
        latents = latents.to(weights.device, weights.dtype)
        videos = latents if latents.ndim == 5 else latents[:, :, None]  # [B, C, F, h, w]
        batch, _, latent_frames, height, width = videos.shape
        ratio, frames = weights.spatial_ratio(), weights.frames(latent_frames)
        free = free_bytes(weights.device)
        output = Output(layout, (batch * frames, ratio * height, ratio * width, weights.channels), videos)
        budget = free - output.tensor.nbytes if budget_bytes is None else budget_bytes
        plan = self.plan(latent_frames, height, width, budget)
        for index, video in enumerate(videos.permute(0, 2, 3, 4, 1).contiguous()):  # [F, h, w, C]
            write = _writer(output, index * frames, weights.dropped, ratio * height, emit)
            self.run(plan, self._pieces(video), write, check)
        if layout is not Layout.SAMPLE or latents.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)

    def _pieces(self, video: Tensor) -> list[Piece]:  # [F, h, w, C]
        """Return the latents that enter the first layer, as chunks or, where these do not matter, at once."""
        post_quant, frames = self.weights.post_quant, len(video)
        latents = video if post_quant is None else F.linear(video, post_quant.weight, post_quant.bias)  # [F, h, w, C']
        lengths = [frames] if self.network.is_divisible else self.weights.chunk_lengths(frames)
        is_single = self.weights.starts_single(frames)
        return [
            Piece(Place(number, is_single and number == 0, chunk), State(chunk))
            for number, chunk in enumerate(torch.split(latents, lengths))
        ]


def _writer(output: Output, first: int, dropped: int, height: int, emit: Emit | None) -> Write:
    """Return a function that writes finished rows of one video, whose first frame is frame `first` of the output.

    dropped: how many frames at the start are not part of the video. emit: is given frames once their last row is done.
    """

    def write(frame: int, top: int, sample: Tensor) -> None:  # [n, rows, W, C]
        sample = sample[max(0, dropped - frame) :]
        start = first + max(0, frame - dropped)
        if not len(sample):
            return
        output.write(start, top, sample)
        if emit is not None and top + sample.shape[1] == height:
            emit(output.tensor[start : start + len(sample)], output.finite)

    return write
