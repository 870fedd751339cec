"""Kandinsky 5: latents with the channels last, `[B, F, h, w, C]`; of the VAE's statistics the scaling factor alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run, seeded

TRANSFORMER: dict[str, Any] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 16,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (2, 2, 4),
}
NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
PROMPT = {
    "prompt_embeds_qwen": noise(1, 4, 8),
    "prompt_embeds_clip": noise(1, 8),
    "prompt_cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
}


def parts(vae: Any) -> dict[str, Any]:
    transformer = seeded(Kandinsky5Transformer3DModel, **TRANSFORMER)
    return {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), **NO_TEXT}


def text_to_video() -> Sample:
    pipe = Kandinsky5T2VPipeline(**parts(vaes.hunyuan_video()))
    return run("kandinsky5-video", pipe, guidance_scale=1.0, height=64, width=32, num_frames=9, **PROMPT)


def text_to_image() -> Sample:
    """The pipeline makes pictures of a list of sizes alone, all of about a megapixel."""
    pipe = Kandinsky5T2IPipeline(**parts(vaes.kl16()))
    pipe.resolutions = [(48, 64)]
    return run("kandinsky5-image", pipe, guidance_scale=1.0, height=64, width=48, **PROMPT)


SAMPLES = {"kandinsky5-video": text_to_video, "kandinsky5-image": text_to_image}
