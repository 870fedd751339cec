"""Oobleck, the VAE of Stable Audio and of ACE-Step. Its latents are not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from .audio_base import Audio

if TYPE_CHECKING:
    import torch

PEAK = 10 ** (-1 / 20)  # 1 dB below full scale
SILENCE = 1e-6  # what is quieter is not made louder
LONGEST = 1024  # steps of the latents that are decoded at once: 47 seconds of Stable Audio


class Oobleck(Audio):
    """Decodes as `StableAudioPipeline` does, whose latents are `[B, C, L]`."""

    name = "oobleck"
    class_names = ("AutoencoderOobleck",)
    channels_key = "decoder_input_channels"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 1, and the product of the downsampling ratios."""
        return 1, prod(config["downsampling_ratios"])

    def sampling_rate(self, config: Mapping[str, Any]) -> int:
        """Read the rate from the config."""
        rate: int = config["sampling_rate"]
        return rate

    def channels(self, config: Mapping[str, Any]) -> int:
        """Read the channels from the config."""
        channels: int = config["audio_channels"]
        return channels

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode. Long latents are decoded in diffusers' tiles, which bounds the memory of the activations.

        A tile begins 64 steps before the part that is kept and ends 64 steps after it. A sample depends on about 10
        steps on each side, so the waveform is the same.
        """
        vae.use_tiling, vae.tile_latent_min_length = True, LONGEST
        return super().decode(vae, latents, **arguments)


class AceStep(Oobleck):
    """Decodes as `AceStepPipeline` does: its latents are `[B, L, C]`, and every waveform is made equally loud."""

    name = "ace_step"
    layouts = ("BLC", "BCL")

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode, and scale each waveform so that its peak is 1 dB below full scale."""
        audio = super().decode(vae, latents, **arguments).float()  # [B, channels, samples]
        peak = audio.abs().amax((1, 2), keepdim=True)  # [B, 1, 1]
        audio = audio / peak.clamp(min=1)
        peak = (peak / peak.clamp(min=1)).clamp(min=SILENCE)
        return audio * (PEAK / peak)
