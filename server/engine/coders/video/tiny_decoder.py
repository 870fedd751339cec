"""The decoder of the TAEHV family, frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from ....model_info import EXACT
from ....values import Layout
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from .tiny_layers import SCALE, TAEHV


class TinyVideoDecoder:
    """Decodes one frame after the other, and gives each away as soon as it is done.

    Besides the answer, it holds the activations of one frame and one earlier frame for each block.
    """

    name = EXACT
    heeds_budget = False

    def __init__(self, vae: TAEHV) -> None:
        self.vae = vae

    def free_caches(self) -> None:
        """Do nothing, because this decoder caches nothing between calls."""

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
        """Decode as `Decoder.decode` says. The budget has no effect, because no frame is computed in parts."""
        weight = next(self.vae.decoder.parameters())
        videos = latents.to(weight.device, weight.dtype)
        batch, _, latent_frames, height, width = videos.shape
        frames, ratio = sum(self.vae.kept(latent_frames)), SCALE * self.vae.config.patch_size
        output = Output(layout, (batch * frames, ratio * height, ratio * width, 3), videos)
        done = 0
        for video in videos:  # [C, F, h, w]
            for frame in self.vae.decode_frames(video, check):  # [1, 3, H, W]
                output.write(done, 0, frame.permute(0, 2, 3, 1))
                if emit is not None:
                    emit(output.tensor[done : done + 1], output.finite)
                done += 1
        if layout is not Layout.SAMPLE:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, 3, F, H, W]
        return Coded(sample, output.finite)
