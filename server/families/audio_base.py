"""The common part of the audio families: latents `[B, C, L]`, which decode to a waveform `[B, channels, samples]`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Impossible, WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Family, Sent, shape_text

if TYPE_CHECKING:
    import torch


class Audio(Family):
    """A family of audio VAEs, which this server only decodes.

    In `Geometry`, `num_frames` counts the samples of each channel, and height and width are 1. In `LatentSpec`,
    `temporal_compression_ratio` is the number of samples for each step of the latents, and `image_channels` the number
    of channels of the waveform.

    layouts: the orders of axes that are accepted, as far as the shape tells them apart. The first one is that of the
        pipeline's latents.
    """

    kind = "audio"
    gpu_dtype = "float32"
    layouts: ClassVar[tuple[str, ...]] = ("BCL", "BLC")

    @abstractmethod
    def sampling_rate(self, config: Mapping[str, Any]) -> int:
        """Return the samples per second of what a VAE with this config.json decodes to."""

    @abstractmethod
    def channels(self, config: Mapping[str, Any]) -> int:
        """Return the channels of the waveform: 1 for mono, 2 for stereo."""

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Say also how the waveform is sampled."""
        rate, channels = self.sampling_rate(config), self.channels(config)
        if not (isinstance(rate, int) and rate > 0 and channels in (1, 2)):
            raise ValueError("its sampling rate must be a whole number, and its audio mono or stereo")
        return replace(super().describe(config), sampling_rate=rate, image_channels=channels, has_encoder=False)

    def samples(self, spec: LatentSpec, steps: int) -> int:
        """Return how many samples so many steps of the latents decode to."""
        return steps * spec.temporal_compression_ratio

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of short latents. Height and width mean nothing here."""
        return (1, spec.channels, 8)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes of latents, from their shape only. Two axes are latents without a batch axis.

        Raises WrongShape, WrongChannels.
        """
        usual = ", ".join(self.layouts[0]).replace("C", str(spec.channels))
        if len(shape) not in (2, 3):
            raise WrongShape(
                f"shape {shape_text(shape)} has {len(shape)} dimensions; this model takes audio latents [{usual}]"
            )
        whole = shape if len(shape) == 3 else (1, *shape)
        axes = next((axes for axes in self.layouts if whole[axes.index("C")] == spec.channels), None)
        if axes is None:
            raise WrongChannels(
                f"shape {shape_text(shape)} is not audio latents of this model, [{usual}]; were they made for another "
                "model? GET /models lists each model's channels"
            )
        batch, steps = whole[0], whole[axes.index("L")]
        return self.sized(spec, (batch, spec.channels, steps), steps, axes)

    def sized(self, spec: LatentSpec, latent_shape: tuple[int, ...], steps: int, axes: str) -> Geometry:
        """Return the sizes of latents of this many steps."""
        frames = self.samples(spec, steps)
        return Geometry(latent_shape, is_packed=False, num_frames=frames, height=1, width=1, axes=axes)

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """Raise Impossible."""
        raise Impossible("this server decodes audio and does not encode it")

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return latents `[B, C, L]`."""
        b, c, steps = geometry.latent_shape
        if geometry.axes == "BLC":
            return latents.reshape(b, steps, c).transpose(1, 2)
        return latents.reshape(b, c, steps)
