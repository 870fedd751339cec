"""Pictures of packed latents whose statistics the VAE keeps per channel: Qwen-Image and FLUX.2."""

from __future__ import annotations

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, run, seeded

SIZE = {"height": 64, "width": 48}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def qwen_image() -> Sample:
    transformer = seeded(QwenImageTransformer2DModel, out_channels=16, num_layers=1, axes_dims_rope=(8, 4, 4), **HEADS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = QwenImagePipeline(scheduler=scheduler, vae=vaes.qwen_image(), transformer=transformer, **NO_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_embeds_mask": ones(1, 4)}
    return run("qwen-image", pipe, is_packed=True, true_cfg_scale=1.0, **SIZE, **prompt)


def flux2(name: str, **config: Any) -> Sample:
    layers = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
    transformer = seeded(Flux2Transformer2DModel, in_channels=128, **layers, **HEADS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = Flux2Pipeline(scheduler=scheduler, vae=vaes.flux2(**config), transformer=transformer, **NO_TEXT)
    return run(name, pipe, is_packed=True, prompt_embeds=noise(1, 4, 8), **SIZE)


SMALL = {"block_out_channels": (8, 8, 16, 16), "decoder_block_out_channels": (4, 8, 8, 12)}  # FLUX.2-small-decoder
SAMPLES = {
    "qwen-image": qwen_image,
    "flux2": lambda: flux2("flux2"),
    "flux2-small-decoder": lambda: flux2("flux2-small-decoder", **SMALL),
}
