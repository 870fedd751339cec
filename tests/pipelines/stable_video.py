"""Stable Video Diffusion: latents `[B, F, 4, H/8, W/8]`, frames before channels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, run, seeded

UNET: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "cross_attention_dim": 8,
    "num_attention_heads": 2,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}
CLIP: dict[str, Any] = {
    "hidden_size": 8,
    "projection_dim": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "intermediate_size": 16,
    "patch_size": 16,
}


def stable_video() -> Sample:
    unet = seeded(UNetSpatioTemporalConditionModel, **UNET)
    torch.manual_seed(0)
    parts = {
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)).eval(),
        "feature_extractor": CLIPImageProcessor(crop_size=32, size=32),
        "scheduler": EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True, sigma_max=4.0),
    }
    pipe = StableVideoDiffusionPipeline(vae=vaes.temporal(), unet=unet, **parts)
    image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return run("stable-video", pipe, image=image, height=32, width=48, num_frames=3)


SAMPLES = {"stable-video": stable_video}
