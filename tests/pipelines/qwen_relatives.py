"""The models that took over Qwen-Image's VAE: Krea 2, Anima, and Qwen-Image-Layered with an alpha channel."""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines.anima.decoders import AnimaProcessImagesOutputStep, AnimaVaeDecoderStep
from diffusers.modular_pipelines.krea2.decoders import Krea2DecodeStep, Krea2UnpackLatentsStep
from diffusers.modular_pipelines.qwenimage.decoders import (
    QwenImageLayeredAfterDenoiseStep,
    QwenImageLayeredDecoderStep,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run_block

SIZE: dict[str, Any] = {"height": 64, "width": 48}


def krea2() -> Sample:
    blocks = [Krea2UnpackLatentsStep(), Krea2DecodeStep()]
    return run_block("krea2", blocks, noise(1, 12, 64), vae=vaes.qwen_image(), is_packed=True, **SIZE)


def anima() -> Sample:
    blocks = [AnimaVaeDecoderStep(), AnimaProcessImagesOutputStep()]
    return run_block("anima", blocks, noise(1, 16, 1, 8, 6), vae=vaes.qwen_image())


def layered() -> Sample:
    blocks = [QwenImageLayeredAfterDenoiseStep(), QwenImageLayeredDecoderStep()]
    vae = vaes.qwen_image(input_channels=4)
    return run_block("qwen-image-layered", blocks, noise(1, 48, 64), vae=vae, is_packed=True, layers=3, **SIZE)


def layered_unpacked() -> Sample:
    vae, latents = vaes.qwen_image(input_channels=4), 3 * noise(1, 16, 4, 8, 6)
    return run_block("qwen-image-layered-unpacked", QwenImageLayeredDecoderStep(), latents, vae=vae)


SAMPLES = {
    "krea2": krea2,
    "anima": anima,
    "qwen-image-layered": layered,
    "qwen-image-layered-unpacked": layered_unpacked,
}
