"""CogVideoX: frames first, and in version 1.5 latent frames ahead of the clip that only fill up a patch."""

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
    """Unscaled as `CogVideoXPipeline.decode_latents` does: the scaling factor alone."""

    name = "cogvideox"
    class_names = ("AutoencoderKLCogVideoX",)
    layouts = ("BFCHW", "BCFHW")
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        return replace(super().describe(config), inverts_scale=bool(config.get("invert_scale_latents")))

    def scale(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """As `CogVideoXImageToVideoPipeline` does: some checkpoints were trained on latents scaled the other way."""
        if scaling.from_model and scaling.factor is None and spec.inverts_scale:
            return latents / (spec.scaling_factor or 1.0)
        return super().scale(latents, spec, scaling)

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """Two latent frames at a time, and the odd one first: only then a frame stands for itself."""
        ratio = spec.temporal_compression_ratio
        return ratio * (latent_frames - 1) + 1 if latent_frames % 2 else ratio * latent_frames

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """`num_frames` says how many of the latent frames are the clip: those before it are dropped."""
        found = super().decode_geometry(spec, shape, sent)
        asked = sent.integer("num_frames")
        if not asked:
            return found
        batch, channels, frames, h, w = found.latent_shape
        kept = (asked - 1) // spec.temporal_compression_ratio + 1
        if kept > frames:
            raise WrongShape(f"num_frames={asked} needs {kept} latent frames, there are {frames}; check num_frames")
        num_frames = self.num_frames(spec, kept)
        shape = batch, channels, kept, h, w
        return replace(found, latent_shape=shape, num_frames=num_frames, skipped_frames=frames - kept)
