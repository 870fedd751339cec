"""CogVideoX, EasyAnimate and Mochi: their norms are over whole pictures, so only chunks of frames are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .causal import Past, going_on_from
from .slabs import Part


class WholePictures:
    """Of these the first half is all there is."""

    parts: tuple[Part, ...] = ()

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.channels: int = vae.config.out_channels

    def values_per_pixel(self, latent_frames: int) -> float:
        return 0

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        return iter(chunks)


class CogVideoX(WholePictures):
    """In diffusers' own chunks, over which its norms are: two latent frames, the odd one with the first."""

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        size, frames = self.vae.num_latent_frames_batch_size, latents.shape[2]
        first = min(frames, size + frames % size)
        cache = None
        for chunk in (latents[:, :, :first], *torch.split(latents[:, :, first:], size, dim=2)):
            if chunk.shape[2]:
                quantized = chunk if self.vae.post_quant_conv is None else self.vae.post_quant_conv(chunk)
                sample, cache = self.vae.decoder(quantized, conv_cache=cache)  # [1, 3, n, H, W]
                yield sample


class Magvit(WholePictures):
    """In diffusers' own chunks, over which its norms may be: the first latent frame, and so many each after it."""

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        quantized = self.vae.post_quant_conv(latents)  # [1, C, F, h, w]
        self.vae._clear_conv_cache()  # of a decode that broke off
        yield self.vae.decoder(quantized[:, :, :1])
        for start in range(1, latents.shape[2], self.vae.num_latent_frames_batch_size):
            yield self.vae.decoder(quantized[:, :, start : start + self.vae.num_latent_frames_batch_size])
        self.vae._clear_conv_cache()


class Mochi(WholePictures):
    """A latent frame at a time; diffusers has the whole clip at once. The norms are over each frame."""

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        past: Past = {}
        dropped = self.vae.temporal_compression_ratio - 1 if self.vae.drop_last_temporal_frames else 0
        for frame in torch.split(latents, 1, dim=2):  # [1, C, 1, h, w]
            with going_on_from(past, self.vae.decoder):
                sample, _ = self.vae.decoder(frame)  # [1, 3, T, H, W]
            yield sample[:, :, dropped:]
            dropped = 0
