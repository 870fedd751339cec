"""Any VAE class of diffusers, if models.yaml says `decoder: plain`: its own decode and encode.

The server knows only the config.json of such a VAE. The result is right if the VAE is like most others: its latents are
scaled with `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` of its config, and its pixels are RGB in
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from .base import Family
from .kl import KL
from .video_base import Video

if TYPE_CHECKING:
    import torch

CHANNELS = ("latent_channels", "z_dim", "latent_dim")
SPATIAL = ("spatial_compression_ratio", "scale_factor_spatial", "vae_scale_factor")
TEMPORAL = ("temporal_compression_ratio", "scale_factor_temporal")
LEVELS = ("block_out_channels", "down_block_out_channels", "decoder_block_out_channels", "dim_mult", "ch_mult")


def is_video(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a video VAE: whether any key of it speaks of time."""
    return any("temporal" in key or "temperal" in key for key in config)


def ratios(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the spatial and the temporal compression ratio.

    If the config does not name them, the spatial one is guessed from the number of levels, and the temporal one is 1.
    A wrong guess affects limits and headers, but not the pixels.
    """
    levels = next((len(config[key]) for key in LEVELS if config.get(key)), 4)
    spatial = next((config[key] for key in SPATIAL if config.get(key)), 2 ** (levels - 1))
    return int(spatial), int(next((config[key] for key in TEMPORAL if config.get(key)), 1))


def with_channels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with `latent_channels`, which other classes call `z_dim` or `latent_dim`.

    Raises ValueError if the config has none of these keys.
    """
    found = next((config[key] for key in CHANNELS if config.get(key)), None)
    if found is None:
        raise ValueError(
            f"`decoder: plain` needs the number of latent channels, and its config has none of {', '.join(CHANNELS)}"
        )
    return {**config, "latent_channels": found}


def parameters_of(encoded: torch.Tensor) -> torch.Tensor:
    """Return the parameters `[B, 2C, ...]` of a posterior whose mean is `encoded` and whose variance is almost 0."""
    parameters = encoded.new_full((len(encoded), 2 * encoded.shape[1], *encoded.shape[2:]), -30.0)
    parameters[:, : encoded.shape[1]] = encoded
    return parameters


class Plain(Family):
    """The common part of plain image and video VAEs."""

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Describe the VAE from its config. Raises ValueError if the number of latent channels is unknown."""
        return super().describe(with_channels(config))

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return the posterior's parameters; a VAE that encodes to latents gets a posterior of almost no variance."""
        encoded = vae.encode(pixels, return_dict=False)[0]
        return encoded.parameters if hasattr(encoded, "parameters") else parameters_of(encoded)


class PlainImage(Plain, KL):
    """An image VAE of any class."""

    name = "plain"
    class_names = ()

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the spatial ratio of the config, or a guess, and 1."""
        return ratios(config)[0], 1


class PlainVideo(Plain, Video):
    """A video VAE of any class."""

    name = "plain_video"
    class_names = ()

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the ratios of the config, or a guess."""
        return ratios(config)
