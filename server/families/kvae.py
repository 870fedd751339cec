"""KVAE of Kandinsky, for images and for videos. Its latents are not scaled: its config has no statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .kl import KL
from .video_base import Video

SEGMENT_FRAMES = 16  # the frames of every segment of a video but the first, which has one more


class KVAE(KL):
    """KVAE for images, `[B, C, H, W]`."""

    name = "kvae"
    class_names = ("AutoencoderKLKVAE",)
    channels_key = "z_channels"
    gpu_dtype = "bfloat16"  # as in diffusers' documentation

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the levels, and 1."""
        return 2 ** (len(config["ch_mult"]) - 1), 1


class KVAEVideo(Video):
    """KVAE for videos. diffusers computes them in segments, whose norms all use the statistics of the first one."""

    name = "kvae_video"
    class_names = ("AutoencoderKLKVAEVideo",)
    channels_key = "z_channels"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the levels, and the temporal ratio of the config."""
        return 2 ** (len(config["ch_mult"]) - 1), config["temporal_compress_times"]

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes. Raises WrongShape too if the last segment would have only one latent frame.

        diffusers 0.42 decodes such a segment as if it were the first one, and returns too few frames.
        """
        found = super().decode_geometry(spec, shape, sent)
        frames, segment = found.latent_shape[2], SEGMENT_FRAMES // spec.temporal_compression_ratio
        if frames > 2 and frames % segment == 2 % segment:
            raise WrongShape(
                f"{frames} latent frames cannot be decoded: diffusers would drop frames at the end of the video; send "
                f"{frames - 1} or {frames + 1} latent frames"
            )
        return found
