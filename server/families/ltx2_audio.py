"""The audio VAE of LTX-2, which decodes to spectrograms, and the vocoder that makes sound of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .audio_base import Audio
from .base import Sent, shape_text

if TYPE_CHECKING:
    import torch

SPECTRA_PER_STEP = 4  # of the mel spectrogram, for each step of the latents; diffusers' LATENT_DOWNSAMPLE_FACTOR
BINS_PER_BIN = 4  # mel bins for each row of the latents


class LTX2Audio(Audio):
    """Decodes as `LTX2Pipeline` does.

    The latents inside the pipeline's loop are packed and scaled, `[B, L, C M]` with M rows of mel bins; those that it
    returns are neither, `[B, C, L, M]`. As in `LTX2`, `do_scaling` unscales only the packed ones. The statistics are
    buffers of the VAE. The vocoder is loaded from the folder `vocoder` of the same pipeline.
    """

    name = "ltx2_audio"
    class_names = ("AutoencoderKLLTX2Audio",)
    companion = "vocoder"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 1, and the samples of the waveform for each step of the latents."""
        samples = SPECTRA_PER_STEP * config["mel_hop_length"] * self.sampling_rate(config)
        return 1, samples // config["sample_rate"]

    def sampling_rate(self, config: Mapping[str, Any]) -> int:
        """Read the rate from the config of the vocoder."""
        rate: int = config["vocoder"]["output_sampling_rate"]
        return rate

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return the channels of the spectrogram, which are those of the sound."""
        channels: int = config["output_channels"]
        return channels

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Say also how many rows of mel bins the latents have: as `patch_size`, because they are packed together."""
        return replace(super().describe(config), patch_size=config["mel_bins"] // BINS_PER_BIN)

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """Read the statistics, one for each channel and row, from the buffers of the VAE."""
        mean, std = vae.latents_mean.float().tolist(), vae.latents_std.float().tolist()
        return replace(spec, latents_mean=tuple(mean), latents_std=tuple(std))

    def samples(self, spec: LatentSpec, steps: int) -> int:
        """Return how many samples so many steps decode to. The decoder is causal: the first step gives one spectrum."""
        per_spectrum = spec.temporal_compression_ratio // SPECTRA_PER_STEP
        return max((steps - 1) * SPECTRA_PER_STEP + 1, 0) * per_spectrum

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of short latents."""
        return (1, spec.channels, 8, spec.patch_size)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept packed latents of three axes, and unpacked ones of four. Raises WrongShape, WrongChannels."""
        channels, rows = spec.channels, spec.patch_size
        expected = f"[B, {channels}, L, {rows}], or packed ones [B, L, {channels * rows}]"
        if len(shape) not in (3, 4):
            raise WrongShape(
                f"shape {shape_text(shape)} has {len(shape)} dimensions; this model takes audio latents {expected}"
            )
        is_packed = len(shape) == 3
        steps = shape[1] if is_packed else shape[2]
        if shape[2:] != (channels * rows,) if is_packed else (shape[1], shape[3]) != (channels, rows):
            raise WrongChannels(f"shape {shape_text(shape)} is not audio latents of this model, {expected}")
        found = self.sized(spec, (shape[0], channels, steps, rows), steps, "BCLM")
        return replace(found, is_packed=is_packed)

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Unscale and unpack. Latents that were not packed are unscaled only with values that the client sent."""
        batch, channels, steps, rows = geometry.latent_shape
        if not geometry.is_packed:
            unpacked = latents.reshape(geometry.latent_shape)  # [B, C, L, M]
            return self.unscale(unpacked, spec, replace(scaling, from_model=False))
        packed = latents.reshape(batch, steps, channels * rows).transpose(1, 2)  # [B, C M, L]
        unscaled = self.unscale(packed, spec, scaling)
        return unscaled.reshape(batch, channels, rows, steps).transpose(2, 3)  # [B, C, L, M]

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode to a spectrogram `[B, channels, spectra, bins]`, and that to a waveform `[B, channels, samples]`."""
        spectrogram = super().decode(vae, latents, **arguments)
        audio: torch.Tensor = vae.vocoder(spectrogram)
        return audio
