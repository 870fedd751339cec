"""Wan 2.1 and 2.2: latents `[B, C, F, h, w]` of a clip of `4 (F - 1) + 1` frames."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run, seeded

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan(name: str, vae: Any, **inputs: Any) -> Sample:
    channels = vae.config.z_dim
    transformer = seeded(WanTransformer3DModel, in_channels=channels, out_channels=channels, **TRANSFORMER)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    return run(name, pipe, guidance_scale=0.0, prompt_embeds=noise(1, 4, 8), **inputs)


SAMPLES = {
    "wan": lambda: wan("wan", vaes.wan(), height=48, width=32, num_frames=9),
    "wan-one-frame": lambda: wan("wan-one-frame", vaes.wan(), height=48, width=32, num_frames=1),
    "wan-2.2-5b": lambda: wan("wan-2.2-5b", vaes.wan_22(), height=96, width=64, num_frames=5),
}
