"""The VAE of Allegro, a text-to-video model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Impossible
from ..model_info import LatentSpec
from .video_base import Video

if TYPE_CHECKING:
    import torch


class Allegro(Video):
    """Every latent frame, the first one too, decodes to four frames. The VAE of diffusers runs only in tiles."""

    name = "allegro"
    class_names = ("AutoencoderKLAllegro",)
    takes_batches = False
    gpu_dtype = "float32"  # as in the documentation of its pipeline

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the encoder's levels, and the temporal ratio of the config."""
        return 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """Return how many frames so many latent frames decode to."""
        return latent_frames * spec.temporal_compression_ratio

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        """Return how many latent frames a video encodes to. Raises Impossible unless the frames divide evenly."""
        if num_frames % spec.temporal_compression_ratio:
            raise Impossible(
                f"a video of {num_frames} frames cannot be encoded: this model takes a multiple of "
                f"{spec.temporal_compression_ratio} frames; send a shorter or longer video"
            )
        return num_frames // spec.temporal_compression_ratio

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """Decode in diffusers' tiles. Raises Impossible if the video is smaller than one tile."""
        vae.enable_tiling()
        self._check_tile(vae, 4 * latents.shape[2], 8 * latents.shape[3], 8 * latents.shape[4])
        return super().decode(vae, latents).transpose(1, 2)  # [B, F, 3, H, W] -> [B, 3, F, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode in diffusers' tiles. Raises Impossible if the video is smaller than one tile."""
        vae.enable_tiling()
        self._check_tile(vae, *pixels.shape[2:])
        return super().encode(vae, pixels)

    def _check_tile(self, vae: Any, frames: int, height: int, width: int) -> None:
        least_frames, least_height, least_width = vae.kernel
        if frames < least_frames or height < least_height or width < least_width:
            raise Impossible(
                f"{frames} frames of {height}x{width} are smaller than one tile of this model's VAE, {least_frames} "
                f"frames of {least_height}x{least_width}; send a longer or larger video"
            )
