"""Clips by VAEs of their own: CogVideoX, Mochi, EasyAnimate, Allegro."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, run, seeded

NO_TEXT = {"text_encoder": None, "tokenizer": None}
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 4,
    "text_embed_dim": 8,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 4,
}
MOCHI: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 12,
    "text_embed_dim": 8,
    "time_embed_dim": 4,
    "max_sequence_length": 4,
}
EASY_ANIMATE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 4,
    "text_embed_dim": 8,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 8,
    "patch_size": 2,
    "add_norm_text_encoder": True,
}
ALLEGRO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 6,
}


def cogvideox(name: str, num_frames: int, **config: Any) -> Sample:
    transformer = seeded(CogVideoXTransformer3DModel, **COGVIDEOX | config)
    scheduler = CogVideoXDDIMScheduler()
    pipe = CogVideoXPipeline(vae=vaes.cogvideox(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    size = {"height": 48, "width": 32, "num_frames": num_frames}
    return run(name, pipe, guidance_scale=1.0, prompt_embeds=noise(1, 4, 8), **size)


def mochi() -> Sample:
    transformer = seeded(MochiTransformer3DModel, **MOCHI)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = MochiPipeline(scheduler=scheduler, vae=vaes.mochi(), transformer=transformer, **NO_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4).bool()}
    return run("mochi", pipe, guidance_scale=1.0, height=32, width=16, num_frames=7, **prompt)


def easy_animate() -> Sample:
    transformer = seeded(EasyAnimateTransformer3DModel, **EASY_ANIMATE)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = EasyAnimatePipeline(vae=vaes.magvit(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4)}
    return run("easy-animate", pipe, guidance_scale=1.0, height=64, width=32, num_frames=9, **prompt)


def allegro() -> Sample:
    transformer = seeded(AllegroTransformer3DModel, **ALLEGRO)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = AllegroPipeline(vae=vaes.allegro(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4), "negative_prompt": None}
    return run("allegro", pipe, guidance_scale=1.0, height=128, width=128, num_frames=24, **prompt)


SAMPLES = {
    "cogvideox": lambda: cogvideox("cogvideox", 9),
    "cogvideox-even": lambda: cogvideox("cogvideox-even", 8),
    "cogvideox-1.5": lambda: cogvideox(
        "cogvideox-1.5", 9, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True
    ),
    "mochi": mochi,
    "easy-animate": easy_animate,
    "allegro": allegro,
}
