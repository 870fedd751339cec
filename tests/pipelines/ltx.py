"""LTX-Video: latents are tokens, one for each latent pixel: `[B, F h w, C]`."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, run, seeded

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 8,
    "num_layers": 1,
}


def ltx(name: str, vae: Any, **inputs: Any) -> Sample:
    transformer = seeded(LTXVideoTransformer3DModel, **TRANSFORMER)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LTXPipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    prompt = {"prompt_embeds": noise(1, 4, 8), "prompt_attention_mask": ones(1, 4)}
    size = {"height": 96, "width": 64, "num_frames": 9}
    return run(name, pipe, is_packed=True, guidance_scale=1.0, **prompt, **size, **inputs)


SAMPLES = {
    "ltx": lambda: ltx("ltx", vaes.ltx()),
    "ltx-timestep": lambda: ltx("ltx-timestep", vaes.ltx(timestep_conditioning=True)),
}
