"""Transformers over the VAEs of SD3 and FLUX.1: latents `[B, 16, H/8, W/8]`, or packed in patches of 2x2."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.pipelines.sample import Sample, noise, ones, run, seeded
from tests.pipelines.vaes import kl16, tiny

SIZE = {"height": 64, "width": 48}
ONE_TEXT = {"text_encoder": None, "tokenizer": None}
TWO_TEXTS = ONE_TEXT | {"text_encoder_2": None, "tokenizer_2": None}
THREE_TEXTS = TWO_TEXTS | {"text_encoder_3": None, "tokenizer_3": None}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "out_channels": 16,
    "pos_embed_max_size": 16,
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 4, 8),
}
APPROXIMATOR = {"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16}


def stable_diffusion_3() -> Sample:
    transformer = seeded(SD3Transformer2DModel, **SD3)
    vae = kl16(scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **THREE_TEXTS)
    prompt = {"prompt_embeds": noise(1, 4, 8), "pooled_prompt_embeds": noise(1, 8)}
    return run("sd3", pipe, guidance_scale=0.0, **SIZE, **prompt)


def flux(name: str, vae: Any) -> Sample:
    transformer = seeded(FluxTransformer2DModel, **FLUX, pooled_projection_dim=8)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **TWO_TEXTS)
    prompt = {"prompt_embeds": noise(1, 4, 8), "pooled_prompt_embeds": noise(1, 8)}
    return run(name, pipe, is_packed=True, **SIZE, **prompt)


def chroma() -> Sample:
    transformer = seeded(ChromaTransformer2DModel, **FLUX, **APPROXIMATOR)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = ChromaPipeline(scheduler=scheduler, vae=kl16(), transformer=transformer, **ONE_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4).bool()}
    return run("chroma", pipe, is_packed=True, guidance_scale=0.0, **SIZE, **prompt)


SAMPLES = {
    "sd3": stable_diffusion_3,
    "flux": lambda: flux("flux", kl16()),
    "flux-taef1": lambda: flux("flux-taef1", tiny(latent_channels=16)),
    "chroma": chroma,
}
