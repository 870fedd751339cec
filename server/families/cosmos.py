"""The VAE of Cosmos 1. Cosmos 2 uses that of Wan, see wan.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .video_base import Video


class Cosmos(Video):
    """Unscales as `CosmosTextToWorldPipeline.__call__` does: by channel and latent frame, divided by `sigma_data`.

    sigma_data: the constant of the pipeline's scheduler.
    """

    name = "cosmos"
    class_names = ("AutoencoderKLCosmos",)
    has_posterior = False
    is_scaled_in_comfyui = True  # ComfyUI's VAE unscales them; latent_formats.Cosmos1CV8x8x8 changes nothing
    gpu_dtype = "bfloat16"
    sigma_data = 0.5

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read both ratios from the config."""
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Use `sigma_data` as the scaling factor."""
        return replace(super().describe(config), scaling_factor=self.sigma_data)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes. Raises WrongShape too if there are more latent frames than statistics."""
        return self._with_statistics(spec, super().decode_geometry(spec, shape, sent))

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """Return the sizes. Raises WrongShape too if there are more latent frames than statistics."""
        return self._with_statistics(spec, super().encode_geometry(spec, batch, frames, height, width))

    def _with_statistics(self, spec: LatentSpec, found: Geometry) -> Geometry:
        most = len(spec.latents_mean or ()) // spec.channels
        if most and found.latent_shape[2] > most:
            raise WrongShape(
                f"{found.latent_shape[2]} latent frames are too many: this model has statistics for at most {most}; "
                "send a shorter video"
            )
        return found
