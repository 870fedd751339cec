"""Sana: pictures by the deep-compression autoencoder, clips by Wan's VAE."""

from __future__ import annotations

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, run, seeded

ATTENTION: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
}
PROMPT = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4)}
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def sana() -> Sample:
    transformer = seeded(SanaTransformer2DModel, in_channels=32, out_channels=32, sample_size=4, **ATTENTION)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SanaPipeline(vae=vaes.dc(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    size = {"height": 128, "width": 64, "use_resolution_binning": False}
    return run("sana", pipe, guidance_scale=1.0, **size, **PROMPT)


def sana_video() -> Sample:
    transformer = seeded(SanaVideoTransformer3DModel, in_channels=16, out_channels=16, sample_size=8, **ATTENTION)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SanaVideoPipeline(vae=vaes.wan(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    size = {"height": 64, "width": 32, "frames": 9, "use_resolution_binning": False}
    return run("sana-video", pipe, guidance_scale=1.0, **size, **PROMPT)


SAMPLES = {"sana": sana, "sana-video": sana_video}
