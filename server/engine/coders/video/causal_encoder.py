"""The exact encoder of causal video VAEs: diffusers' own result, a few frames at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....errors import WrongShape
from ....values import Layout
from ...kernels.choice import causal_kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, go_on
from ..layouts import Output
from . import (
    cogvideox_layers,
    hunyuan_video_15_layers,
    hunyuan_video_layers,
    ltx_encoder_layers,
    ltx_layers,
    magvit_layers,
    mochi_layers,
    wan_layers,
)
from .causal_coder import CausalCoder
from .causal_encoder_layers import CausalEncoder
from .causal_run import Piece
from .causal_stages import State
from .causal_statistics import Place

STRUCTURES = {
    **dict.fromkeys(wan_layers.PREFIXES, wan_layers),
    hunyuan_video_15_layers.NAME: hunyuan_video_15_layers,
    hunyuan_video_layers.NAME: hunyuan_video_layers,
    cogvideox_layers.NAME: cogvideox_layers,
    magvit_layers.NAME: magvit_layers,
    mochi_layers.NAME: mochi_layers,
    **dict.fromkeys(ltx_layers.PREFIXES, ltx_encoder_layers),
}
ENCODED_CLASSES = frozenset(STRUCTURES)


class ExactCausalEncoder(CausalCoder):
    """Takes over the weights of a VAE's encoder; `vae.encode` no longer works afterwards."""

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this encoder cannot run a VAE; None if it can."""
        structure = STRUCTURES.get(type(vae).__name__)
        if structure is None:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(ENCODED_CLASSES))}."
        reason: str | None = structure.encoder_reason(vae)
        return reason

    def __init__(self, vae: Any) -> None:
        weight = next(vae.encoder.parameters())
        kernels = causal_kernels_for(weight.device, weight.dtype)
        self.weights: CausalEncoder = STRUCTURES[type(vae).__name__].take_encoder(vae, kernels)
        super().__init__(self.weights, kernels)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says. The parameters equal those of diffusers within the rounding of the dtype.

        The pixels are moved to the device a few frames at a time. Raises WrongShape for a number of frames that fills
        no whole latent frames, unless diffusers ignores the frames that are left over.
        """
        weights = self.weights
        videos = pixels if pixels.ndim == 5 else pixels[:, :, None]  # [B, C, F, H, W]
        batch, _, sent, height, width = videos.shape
        frames, ratio = weights.frames(sent), weights.spatial_ratio()
        if (frames - 1) % weights.temporal_ratio():
            raise WrongShape(
                f"a video of {frames} frames cannot be encoded: this VAE takes {weights.temporal_ratio()} k + 1 frames"
            )
        latent_frames = weights.latent_frames(frames)
        shape = (batch * latent_frames, height // ratio, width // ratio, weights.channels)
        free = free_bytes(weights.device)
        output = Output(Layout.SAMPLE, shape, torch.empty(0, dtype=weights.dtype, device=weights.device))
        budget = free - output.tensor.nbytes if budget_bytes is None else budget_bytes
        plan = self.plan(latent_frames, *shape[1:3], budget)
        for index, video in enumerate(videos[:, :, :frames].permute(0, 2, 3, 4, 1)):  # [F, H, W, C]

            def write(frame: int, top: int, parameters: Tensor, start: int = index * latent_frames) -> None:
                output.write(start + frame, top, parameters)

            self.run(plan, self._pieces(video), write, check)
        if pixels.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B, 2 C', h, w]
        parameters = output.tensor.view(batch, latent_frames, *output.tensor.shape[1:]).transpose(1, 2)
        return Coded(parameters, output.finite)  # [B, 2 C', f, h, w]

    def _pieces(self, video: Tensor) -> list[Piece]:  # [F, H, W, C]
        """Return the pixels that enter the first layer, as chunks or, where these do not matter, at once."""
        chunks = torch.split(video, self.weights.chunk_lengths(len(video)))
        return [Piece(Place(number, number == 0), State(chunk)) for number, chunk in enumerate(chunks)]
