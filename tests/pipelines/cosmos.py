"""NVIDIA Cosmos, whose scheduler scales the latents too, and whose safety checker cuts pixels off to 1/255."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run, seeded

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "concat_padding_mask": False,
}
PROMPT = {"prompt_embeds": noise(1, 4, 8), "negative_prompt_embeds": noise(1, 4, 8)}


class Unguarded(torch.nn.Module):
    """Stands for the safety checker's large models."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def text_to_world() -> Sample:
    transformer = seeded(CosmosTransformer3DModel, **TRANSFORMER, extra_pos_embed_type="learnable")
    parts = {"vae": vaes.cosmos(), "scheduler": EDMEulerScheduler(sigma_data=0.5), "safety_checker": Unguarded()}
    pipe = CosmosTextToWorldPipeline(text_encoder=None, tokenizer=None, transformer=transformer, **parts)
    return run("cosmos", pipe, are_floored=True, height=64, width=48, num_frames=9, **PROMPT)


def text_to_image() -> Sample:
    transformer = seeded(CosmosTransformer3DModel, **TRANSFORMER, extra_pos_embed_type=None)
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"vae": vaes.wan(), "scheduler": scheduler, "safety_checker": Unguarded()}
    pipe = Cosmos2TextToImagePipeline(text_encoder=None, tokenizer=None, transformer=transformer, **parts)
    return run("cosmos2", pipe, are_floored=True, height=64, width=48, **PROMPT)


SAMPLES = {"cosmos": text_to_world, "cosmos2": text_to_image}
