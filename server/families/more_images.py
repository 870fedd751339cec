"""Picture families that differ from AutoencoderKL in little more than their config's keys and their encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kl import KL


class Tiny(KL):
    """AutoencoderTiny, the TAESD family: previews. It takes latents as the pipelines scale them."""

    name = "tiny"
    class_names = ("AutoencoderTiny",)
    has_posterior = False

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** (len(config["decoder_block_out_channels"]) - 1), 1


class DC(KL):
    """Sana's deep compression autoencoder."""

    name = "dc"
    class_names = ("AutoencoderDC",)
    has_posterior = False
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** (len(config["encoder_block_out_channels"]) - 1), 1


class HunyuanImage(KL):
    """HunyuanImage 2.1, as `HunyuanImagePipeline.__call__` unscales it: the scaling factor alone."""

    name = "hunyuan_image"
    class_names = ("AutoencoderKLHunyuanImage",)
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["spatial_compression_ratio"], 1
