"""CogVideoX. The pipeline's latents have the frames before the channels, `[B, F, C, H, W]`.

Those of version 1.5 may begin with latent frames that only fill up a patch and are not part of the video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Sent
from .video_base import Video

if TYPE_CHECKING:
    import torch


class CogVideoX(Video):
    """Unscales with only the scaling factor, as `CogVideoXPipeline.decode_latents` does."""

    name = "cogvideox"
    class_names = ("AutoencoderKLCogVideoX",)
    layouts = ("BFCHW", "BCFHW")
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the encoder's levels, and the temporal ratio of the config."""
        return 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read also whether encoded latents are divided by the scaling factor."""
        return replace(super().describe(config), inverts_scale=bool(config.get("invert_scale_latents")))

    def scale(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Scale as `CogVideoXImageToVideoPipeline` does: for some checkpoints, divide by the scaling factor."""
        if scaling.from_model and scaling.factor is None and spec.inverts_scale:
            return latents / (spec.scaling_factor or 1.0)
        return super().scale(latents, spec, scaling)

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """Return how many frames the VAE decodes to.

        It decodes two latent frames at a time. The first latent frame decodes to a single frame only if their number is
        odd; otherwise it decodes to as many frames as the others.
        """
        ratio = spec.temporal_compression_ratio
        return ratio * (latent_frames - 1) + 1 if latent_frames % 2 else ratio * latent_frames

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes. If `num_frames` was sent, latent frames at the start that it does not need are skipped."""
        found = super().decode_geometry(spec, shape, sent)
        asked = sent.integer("num_frames")
        if not asked:
            return found
        batch, channels, frames, h, w = found.latent_shape
        kept = (asked - 1) // spec.temporal_compression_ratio + 1
        if kept > frames:
            raise WrongShape(
                f"num_frames={asked} needs {kept} latent frames, but the latents have only {frames}; check num_frames"
            )
        num_frames = self.num_frames(spec, kept)
        shape = batch, channels, kept, h, w
        return replace(found, latent_shape=shape, num_frames=num_frames, skipped_frames=frames - kept)
