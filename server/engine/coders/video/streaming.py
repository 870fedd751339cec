"""Run diffusers' own video decoders in little memory.

A video is decoded in chunks of frames, each of which is given out when it is done. Where the layers allow it, a frame
is also decoded in slabs of rows.
"""

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
from .ltx import LTX
from .slabs import Part, cuts, split

__all__ = ["NETWORKS", "StreamingDecoder"]

# The fixed overhead of a slab, in latent rows: its halo, and the output of the head, which has all rows.
SPARE_ROWS = 4
# In latent rows. With lower slabs, computing the halos costs more time than the memory is worth.
SMALLEST_SLAB = 4


class StreamedNetwork(Protocol):
    """A decoder in two steps, head and tail, each a generator of chunks of frames. The tail is local in space."""

    @property
    def channels(self) -> int:
        """The number of channels of the sample."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """The pieces of the tail, in order; empty if all layers need whole frames."""
        ...

    def values_per_pixel(self, latent_frames: int) -> float:
        """Return how many values the tail holds at its peak for each pixel of a frame. Measured."""
        ...

    def head(self, latents: Tensor) -> Iterator[Tensor]:
        """Run the head on latents `[1, C, F, h, w]`.

        Yield chunks `[1, C', n, h, w]` of whole frames, from the first on.
        """
        ...

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Run the tail on the chunks of the head. Yield samples `[1, C, n, H, W]` of some rows of each chunk.

        cuts: the rows, as `slabs.cuts` returns them. arguments: those of `Decoder.decode`.
        """
        ...


NETWORKS: dict[str, Callable[[Any], StreamedNetwork]] = {
    "AutoencoderKLLTXVideo": LTX,
    "AutoencoderKLLTX2Video": LTX,
    "AutoencoderKLCogVideoX": CogVideoX,
    "AutoencoderKLMagvit": Magvit,
    "AutoencoderKLMochi": Mochi,
}


class StreamingDecoder:
    """A decoder that runs the modules of a diffusers VAE piece by piece.

    The result equals that of diffusers' plain decode, without tiles or slices. The modules are not changed. To keep a
    memory budget, frames are decoded in slabs of rows, one after another, which takes longer.
    """

    name = "streaming"

    @staticmethod
    def unsupported_reason(vae: Any) -> str | None:
        """Return None if a VAE of a class in `NETWORKS` can be decoded in pieces, else one sentence with the reason."""
        if any(getattr(module, "per_channel_scale1", None) is not None for module in vae.decoder.modules()):
            return "Its decoder adds noise that all frames of a video share."
        return None

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(vae.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.decoder = vae.decoder
        self.network = NETWORKS[type(vae).__name__](vae)
        self.family = family
        self.spec = family.describe(vae.config)

    @property
    def heeds_budget(self) -> bool:
        """Return whether the frames can be decoded in slabs of rows."""
        return bool(self.network.parts)

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
        """Decode as `Decoder.decode` says. Frames are emitted as soon as all their rows are done."""
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
        """Return the height of a slab in latent rows: all rows if the budget allows it, else as many as it allows.

        output_bytes: the size of the decoded output, subtracted from the free memory if there is no budget.
        """
        budget = free_bytes(self.device) - output_bytes if budget_bytes is None else budget_bytes
        pixels = self.spec.vae_scale_factor**2 * width  # pixels of one latent row
        row_bytes = self.network.values_per_pixel(latent_frames) * self.dtype.itemsize * pixels
        if not self.network.parts or height * row_bytes <= budget:
            return height
        return min(height, max(SMALLEST_SLAB, int(budget / row_bytes) - SPARE_ROWS))
