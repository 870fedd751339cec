"""AutoencoderTiny, the TAESD family: small VAEs for previews."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..model_info import LatentSpec
from .kl import KL


class Tiny(KL):
    """AutoencoderTiny. It takes scaled latents: the scaling factor in its config is 1."""

    name = "tiny"
    class_names = ("AutoencoderTiny",)
    has_posterior = False

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Say also that the pixels are previews."""
        return replace(super().describe(config), is_preview=True)

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each step between the levels of the network, and 1."""
        return 2 ** (len(config["decoder_block_out_channels"]) - 1), 1
