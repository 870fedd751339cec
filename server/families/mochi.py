"""The VAE of Mochi 1."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from .video_base import Video


class Mochi(Video):
    """Unscales by channel, as `MochiPipeline.__call__` does.

    The VAE decodes the first latent frame to several frames and drops all of them but the last.
    """

    name = "mochi"
    class_names = ("AutoencoderKLMochi",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the products of the expansions of all blocks."""
        return prod(config["spatial_expansions"]), prod(config["temporal_expansions"])
