"""diffusers' own video decoders in little memory: frames leave as they are done, rows by themselves where they may."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ....families import Family
from ....families.video_base import Video
from ....values import Layout
from ...memory import free_bytes
from ..interface import Check, Coded, Emit, checking, go_on
from ..layouts import Output
from .grouped import CogVideoX, Magvit, Mochi
from .hunyuan_video_15 import HunyuanVideo15
from .ltx import LTX
from .slabs import Part, cuts, split
from .wan import Wan

__all__ = ["NETWORKS", "StreamingDecoder"]

# Latent rows. A slab costs memory as so many more would: those around it, and the first half's output, of all rows.
SPARE_ROWS = 4
SMALLEST_SLAB = 4  # at fewer the rows around them cost more time than they save memory


class StreamedNetwork(Protocol):
    """A decoder as two generators of chunks of frames, the second local in space."""

    @property
    def channels(self) -> int:
        """Of the sample."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """What the second half runs, in order; empty where all of it must see whole pictures."""
        ...

    def values_per_pixel(self, latent_frames: int) -> float:
        """How many values the second half holds at once, at most, for each pixel of a picture: measured."""
        ...

    def head(self, latents: Tensor) -> Iterator[Tensor]:
        """[1, C, F, h, w] -> chunks [1, C', n, h, w] of whole pictures, first to last."""
        ...

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Chunks to samples [1, C, n, H, W] of the rows that `slabs.cuts` says."""
        ...


NETWORKS: dict[str, Callable[[Any], StreamedNetwork]] = {
    "AutoencoderKLWan": Wan,
    "AutoencoderKLQwenImage": Wan,
    "AutoencoderKLQwenImage21": Wan,
    "AutoencoderKLHunyuanVideo15": HunyuanVideo15,
    "AutoencoderKLLTXVideo": LTX,
    "AutoencoderKLLTX2Video": LTX,
    "AutoencoderKLCogVideoX": CogVideoX,
    "AutoencoderKLMagvit": Magvit,
    "AutoencoderKLMochi": Mochi,
}


class StreamingDecoder:
    """Equals diffusers' plain decode, without tiles or slices. It runs the VAE's own modules, which stay as they are.

    A memory budget is kept by decoding slabs of rows one after another, which takes longer.
    """

    name = "streaming"

    @staticmethod
    def unsupported_reason(vae: Any) -> str | None:
        """None if a VAE of `NETWORKS` can be decoded in pieces, else one sentence saying why not."""
        if any(getattr(module, "per_channel_scale1", None) is not None for module in vae.decoder.modules()):
            return "Its decoder adds noise that all frames of a clip share."
        return None

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(vae.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.decoder = vae.decoder
        self.network = NETWORKS[type(vae).__name__](vae)
        self.family = family
        self.spec = family.describe(vae.config)

    def free_caches(self) -> None:
        """Do nothing: the modules keep no caches between calls."""

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
        """Decode as `Decoder.decode` says; frames are emitted as soon as all their rows are done."""
        latents = latents.to(self.device, self.dtype)
        videos = latents if latents.ndim == 5 else latents[:, :, None]  # [B, C, F, h, w]
        frames, ratio = self._frames(videos.shape[2]), self.spec.vae_scale_factor
        shape = len(videos) * frames, ratio * videos.shape[3], ratio * videos.shape[4], self.network.channels
        output = Output(layout, shape, latents)
        latent_frames, height, width = videos.shape[2:]
        slab_rows = self.slab_rows(latent_frames, height, width, output.tensor.nbytes, budget_bytes)
        with checking(self.decoder, check):
            for index, video in enumerate(torch.split(videos, 1)):  # [1, C, F, h, w]
                self._decode(video, output, index * frames, slab_rows, emit, arguments)
        if layout is not Layout.SAMPLE or latents.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(-1, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)

    def _decode(
        self,
        video: Tensor,  # [1, C, F, h, w]
        output: Output,
        first: int,
        slab_rows: int,
        emit: Emit | None,
        arguments: dict[str, float],
    ) -> None:
        network, height = self.network, video.shape[3]
        slabs = list(split(height, slab_rows))
        chunks: Iterable[Tensor] = network.head(video)
        chunks = chunks if len(slabs) == 1 else list(chunks)
        for slab in slabs:
            frame = first
            for sample in network.tail(chunks, cuts(network.parts, height, slab), **arguments):  # [1, C, n, H, W]
                after = frame + sample.shape[2]
                output.write(frame, self.spec.vae_scale_factor * slab[0], sample[0].permute(1, 2, 3, 0))
                if emit is not None and slab == slabs[-1]:
                    emit(output.tensor[frame:after])
                frame = after

    def _frames(self, latent_frames: int) -> int:
        return self.family.num_frames(self.spec, latent_frames) if isinstance(self.family, Video) else 1

    def slab_rows(
        self, latent_frames: int, height: int, width: int, output_bytes: int, budget_bytes: int | None = None
    ) -> int:
        """Return as many latent rows together as the budget allows."""
        budget = free_bytes(self.device) - output_bytes if budget_bytes is None else budget_bytes
        pixels = self.spec.vae_scale_factor**2 * width  # of a latent row
        row_bytes = self.network.values_per_pixel(latent_frames) * self.dtype.itemsize * pixels
        if not self.network.parts or height * row_bytes <= budget:
            return height
        return min(height, max(SMALLEST_SLAB, int(budget / row_bytes) - SPARE_ROWS))
