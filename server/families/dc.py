"""AutoencoderDC, the deep compression autoencoder of Sana."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kl import KL


class DC(KL):
    """AutoencoderDC. It encodes to latents and has no posterior."""

    name = "dc"
    class_names = ("AutoencoderDC",)
    has_posterior = False
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each step between the levels of the network, and 1."""
        return 2 ** (len(config["encoder_block_out_channels"]) - 1), 1
