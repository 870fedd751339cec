"""FIBO 1: images from Wan 2.2's video VAE. A token is one latent pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .qwen_image import QwenImage
from .wan import Wan


class Fibo(QwenImage):
    """Decodes each image as a video of one frame, and unscales by channel, as `BriaFiboPipeline.__call__` does."""

    name = "fibo"
    class_names = Wan.class_names
    patch_size = 1

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the spatial ratio of Wan's config, and 1."""
        return Wan().scale_factors(config)[0], 1
