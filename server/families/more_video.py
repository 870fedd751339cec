"""Video families that differ in little more than where their config keeps the compression ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import Impossible, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .video_base import Video

if TYPE_CHECKING:
    import torch


class HunyuanVideo15(Video):
    """HunyuanVideo 1.5, as `HunyuanVideo15Pipeline.__call__` unscales it: the scaling factor alone."""

    name = "hunyuan_video_15"
    class_names = ("AutoencoderKLHunyuanVideo15",)
    takes_batches = False
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]


class Mochi(Video):
    """As `MochiPipeline.__call__` unscales it: by channel. The VAE itself drops the frames before the first."""

    name = "mochi"
    class_names = ("AutoencoderKLMochi",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return prod(config["spatial_expansions"]), prod(config["temporal_expansions"])


class Cosmos(Video):
    """As `CosmosTextToWorldPipeline.__call__` unscales it: by channel and latent frame, over the scheduler's sigma."""

    name = "cosmos"
    class_names = ("AutoencoderKLCosmos",)
    has_posterior = False
    gpu_dtype = "bfloat16"
    sigma_data = 0.5

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        return replace(super().describe(config), scaling_factor=self.sigma_data)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        return self._with_statistics(spec, super().decode_geometry(spec, shape, sent))

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        return self._with_statistics(spec, super().encode_geometry(spec, batch, frames, height, width))

    def _with_statistics(self, spec: LatentSpec, found: Geometry) -> Geometry:
        most = len(spec.latents_mean or ()) // spec.channels
        if most and found.latent_shape[2] > most:
            raise WrongShape(f"{found.latent_shape[2]} latent frames; this model has statistics for {most} at most")
        return found


class Allegro(Video):
    """Four frames to each latent frame, the first too; the VAE runs in tiles only."""

    name = "allegro"
    class_names = ("AutoencoderKLAllegro",)
    takes_batches = False
    gpu_dtype = "float32"  # as its pipeline's documentation runs it

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        return latent_frames * spec.temporal_compression_ratio

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        if num_frames % spec.temporal_compression_ratio:
            raise Impossible(
                f"a clip of {num_frames} frames cannot be encoded: this model takes multiples of "
                f"{spec.temporal_compression_ratio}"
            )
        return num_frames // spec.temporal_compression_ratio

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        vae.enable_tiling()
        self._check_tile(vae, 4 * latents.shape[2], 8 * latents.shape[3], 8 * latents.shape[4])
        return super().decode(vae, latents).transpose(1, 2)  # [B, F, 3, H, W] -> [B, 3, F, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        vae.enable_tiling()
        self._check_tile(vae, *pixels.shape[2:])
        return super().encode(vae, pixels)

    def _check_tile(self, vae: Any, frames: int, height: int, width: int) -> None:
        least_frames, least_height, least_width = vae.kernel
        if frames < least_frames or height < least_height or width < least_width:
            raise Impossible(
                f"{frames} frames of {height}x{width} are less than the tile of {least_frames} frames of "
                f"{least_height}x{least_width} that this model is decoded and encoded in"
            )


class Magvit(Video):
    """EasyAnimate, as `EasyAnimatePipeline.decode_latents` unscales it: the scaling factor alone."""

    name = "magvit"
    class_names = ("AutoencoderKLMagvit",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        levels = len(config["block_out_channels"])
        return 2 ** (levels - 1), 2 ** (levels - 2)
