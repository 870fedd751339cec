"""GLM-Image: an AutoencoderKL with a mean and a standard deviation for each channel, and no scaling factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..model_info import LatentSpec
from .kl import KL


class GlmImage(KL):
    """Unscales with `latents * std + mean`, as `GlmImagePipeline.__call__` does.

    SDXL pipelines with such statistics divide by the scaling factor too, which AutoencoderKL always has.
    """

    name = "glm_image"
    gpu_dtype = "bfloat16"

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Leave out the scaling factor."""
        return replace(super().describe(config), scaling_factor=None, shift_factor=None)
