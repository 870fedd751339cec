"""Stable Diffusion and its relatives of a U-Net: latents `[B, 4, H/8, W/8]`."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.pipelines.sample import Sample, noise, run, seeded
from tests.pipelines.vaes import PLAYGROUND, kl, tiny

SIZE = {"height": 64, "width": 48}
UNET: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56}
SCHEDULER = DDIMScheduler(steps_offset=1, clip_sample=False)
NO_TEXT = {"text_encoder": None, "tokenizer": None}
PROMPT = {"prompt_embeds": noise(1, 4, 8), "negative_prompt_embeds": noise(1, 4, 8)}
POOLED = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8)}


def stable_diffusion(name: str, vae: Any) -> Sample:
    unet = seeded(UNet2DConditionModel, **UNET)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=SCHEDULER, **NO_TEXT, **safety)
    return run(name, pipe, **SIZE, **PROMPT)


def stable_diffusion_xl(name: str, vae: Any) -> Sample:
    unet = seeded(UNet2DConditionModel, **UNET | XL)
    second = {"text_encoder_2": None, "tokenizer_2": None}
    pipe = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=SCHEDULER, **NO_TEXT, **second, add_watermarker=False
    )
    return run(name, pipe, **SIZE, **PROMPT, **POOLED)


SAMPLES = {
    "stable-diffusion": lambda: stable_diffusion("stable-diffusion", kl()),
    "stable-diffusion-taesd": lambda: stable_diffusion("stable-diffusion-taesd", tiny()),
    "sdxl": lambda: stable_diffusion_xl("sdxl", kl(scaling_factor=0.13025, force_upcast=True)),
    "sdxl-playground": lambda: stable_diffusion_xl("sdxl-playground", kl(scaling_factor=0.5, **PLAYGROUND)),
    "sdxl-taesd": lambda: stable_diffusion_xl("sdxl-taesd", tiny()),
}
