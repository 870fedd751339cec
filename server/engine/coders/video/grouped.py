"""CogVideoX, EasyAnimate and Mochi, streamed in chunks of frames only.

Their norms span whole frames, so a frame cannot be computed in slabs of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .causal import Past, going_on_from
from .slabs import Part


class WholeFrames:
    """A network whose head is the whole decoder. Its tail does nothing."""

    parts: tuple[Part, ...] = ()

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.channels: int = vae.config.out_channels

    def values_per_pixel(self, latent_frames: int) -> float:
        """Return 0: the tail holds nothing."""
        return 0

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Yield the chunks unchanged."""
        return iter(chunks)


class CogVideoX(WholeFrames):
    """CogVideoX, in diffusers' own chunks, because its norms span a chunk.

    A chunk has two latent frames. If their number is odd, the first chunk has three.
    """

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Decode chunk by chunk, with diffusers' own cache."""
        size, frames = self.vae.num_latent_frames_batch_size, latents.shape[2]
        first = min(frames, size + frames % size)
        cache = None
        for chunk in (latents[:, :, :first], *torch.split(latents[:, :, first:], size, dim=2)):
            if chunk.shape[2]:
                quantized = chunk if self.vae.post_quant_conv is None else self.vae.post_quant_conv(chunk)
                sample, cache = self.vae.decoder(quantized, conv_cache=cache)  # [1, 3, n, H, W]
                yield sample


class Magvit(WholeFrames):
    """EasyAnimate, in diffusers' own chunks, because its norms may span a chunk.

    The first chunk is the first latent frame; the others have `num_latent_frames_batch_size` latent frames.
    """

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Decode chunk by chunk, with the cache that diffusers keeps in the modules."""
        quantized = self.vae.post_quant_conv(latents)  # [1, C, F, h, w]
        self.vae._clear_conv_cache()  # a decode that was stopped may have left some
        yield self.vae.decoder(quantized[:, :, :1])
        for start in range(1, latents.shape[2], self.vae.num_latent_frames_batch_size):
            yield self.vae.decoder(quantized[:, :, start : start + self.vae.num_latent_frames_batch_size])
        self.vae._clear_conv_cache()


class Mochi(WholeFrames):
    """Mochi, one latent frame at a time, which is exact because its norms span one frame.

    diffusers decodes the whole video at once.
    """

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Decode frame by frame. Of the first latent frame, only the last frame is kept if the config says so."""
        past: Past = {}
        dropped = self.vae.temporal_compression_ratio - 1 if self.vae.drop_last_temporal_frames else 0
        for frame in torch.split(latents, 1, dim=2):  # [1, C, 1, h, w]
            with going_on_from(past, self.vae.decoder):
                sample, _ = self.vae.decoder(frame)  # [1, 3, T, H, W]
            yield sample[:, :, dropped:]
            dropped = 0
