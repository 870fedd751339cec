"""Any VAE class of diffusers, on request (`decoder: plain`): its own decode and encode, with its config's statistics.

Nothing is known of such a class but what its config says. The answer is right if, as with most VAEs, its latents are
scaled by `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`, and its pixels are RGB in [-1, 1].
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
    return any("temporal" in key or "temperal" in key for key in config)


def ratios(config: Mapping[str, Any]) -> tuple[int, int]:
    """Said by the config, or guessed by its levels: limits and headers go by them, the pixels do not."""
    levels = next((len(config[key]) for key in LEVELS if config.get(key)), 4)
    spatial = next((config[key] for key in SPATIAL if config.get(key)), 2 ** (levels - 1))
    return int(spatial), int(next((config[key] for key in TEMPORAL if config.get(key)), 1))


def with_channels(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `latent_channels`, whatever the class calls them. Raises ValueError."""
    found = next((config[key] for key in CHANNELS if config.get(key)), None)
    if found is None:
        raise ValueError(
            f"`decoder: plain` needs the number of latent channels, and its config has none of {', '.join(CHANNELS)}"
        )
    return {**config, "latent_channels": found}


def parameters_of(encoded: torch.Tensor) -> torch.Tensor:
    """Latents as a posterior of no width."""
    parameters = encoded.new_full((len(encoded), 2 * encoded.shape[1], *encoded.shape[2:]), -30.0)
    parameters[:, : encoded.shape[1]] = encoded
    return parameters


class Plain(Family):
    """What pictures and clips share."""

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        return super().describe(with_channels(config))

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        encoded = vae.encode(pixels, return_dict=False)[0]
        return encoded.parameters if hasattr(encoded, "parameters") else parameters_of(encoded)


class PlainImage(Plain, KL):
    name = "plain"
    class_names = ()

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return ratios(config)[0], 1


class PlainVideo(Plain, Video):
    name = "plain_video"
    class_names = ()

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return ratios(config)
