"""The audio VAE of MiniMax-H3, which decodes each channel of a stereo sound by itself."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .audio_base import Audio
from .base import Sent

if TYPE_CHECKING:
    import torch

STEREO = 2


class MiniMaxH3Audio(Audio):
    """Unscales by channel and decodes as `MiniMaxH3AudioDecodeStep` does.

    The pipeline's latents are `[2, C, L]`, one item for each channel of one stereo sound; `[1, C, L]` are mono. Here
    the channels of the sound are put side by side, so that a sound is one item of a batch: `[1, 2 C, L]`.
    """

    name = "minimax_h3_audio"
    class_names = ("AutoencoderKLMiniMaxH3Audio",)
    layouts = ("BCL",)

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 1, and the product of the encoder's strides."""
        return 1, prod(config["encoder_rates"])

    def sampling_rate(self, config: Mapping[str, Any]) -> int:
        """Read the rate from the config."""
        rate: int = config["sampling_rate"]
        return rate

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return 2: the pipeline makes stereo sounds."""
        return STEREO

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes, from the shape only: of `[2, C, L]`, the latent shape is `[1, 2 C, L]`.

        Raises WrongShape too for more than one sound.
        """
        found = super().decode_geometry(spec, shape, sent)
        sounds, channels, steps = found.latent_shape
        if sounds > STEREO:
            raise WrongShape(
                f"the latents have {sounds} items, but one request holds one sound: 2 items are its left and right "
                "channel, and 1 item is mono; send a request for each sound"
            )
        return self.sized(spec, (min(sounds, 1), sounds * channels, steps), steps, found.axes)

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Unscale each channel of the sound, and put them side by side."""
        items = latents.reshape(-1, spec.channels, geometry.latent_shape[2])  # [2, C, L]
        return self.unscale(items, spec, scaling).reshape(geometry.latent_shape)  # [1, 2 C, L]

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode the channels of each sound: `[B, 2 C, L]` -> `[B, 2, samples]`."""
        items = latents.reshape(-1, vae.config.latent_channels, latents.shape[2])  # [2 B, C, L]
        audio = super().decode(vae, items, **arguments)  # [2 B, 1, samples]
        return audio.reshape(len(latents), -1, audio.shape[2])
