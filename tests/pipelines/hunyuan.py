"""Tencent's: HunyuanVideo, HunyuanVideo 1.5, HunyuanImage and HunyuanDiT, none packed, each with a scaling factor."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, run, seeded

NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
TWO_PROMPTS = {
    "prompt_embeds": noise(1, 4, 8),
    "prompt_embeds_mask": ones(1, 4),
    "prompt_embeds_2": noise(1, 4, 8),
    "prompt_embeds_mask_2": ones(1, 4),
}
VIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
VIDEO_15: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "text_embed_2_dim": 8,
    "image_embed_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}
IMAGE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": (1, 1),
    "text_embed_dim": 8,
    "text_embed_2_dim": 8,
    "rope_axes_dim": (4, 4),
    "guidance_embeds": True,
}
DIT: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 8,
    "hidden_size": 16,
    "text_len": 77,
    "text_len_t5": 256,
}


def hunyuan_video() -> Sample:
    transformer = seeded(HunyuanVideoTransformer3DModel, **VIDEO)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = HunyuanVideoPipeline(transformer=transformer, vae=vaes.hunyuan_video(), scheduler=scheduler, **NO_TEXT)
    prompt = {"prompt_embeds": noise(1, 4, 8), "pooled_prompt_embeds": noise(1, 8), "prompt_attention_mask": ones(1, 4)}
    return run("hunyuan-video", pipe, height=48, width=32, num_frames=9, **prompt)


def hunyuan_video_15() -> Sample:
    transformer = seeded(HunyuanVideo15Transformer3DModel, in_channels=65, out_channels=32, **VIDEO_15)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "guider": ClassifierFreeGuidance(guidance_scale=1.0)}
    pipe = HunyuanVideo15Pipeline(transformer=transformer, vae=vaes.hunyuan_video_15(), **parts, **NO_TEXT)
    return run("hunyuan-video-1.5", pipe, height=96, width=64, num_frames=9, **TWO_PROMPTS)


def hunyuan_image() -> Sample:
    transformer = seeded(HunyuanImageTransformer2DModel, in_channels=64, out_channels=64, **IMAGE)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = HunyuanImagePipeline(transformer=transformer, vae=vaes.hunyuan_image(), scheduler=scheduler, **NO_TEXT)
    return run("hunyuan-image", pipe, height=128, width=64, **TWO_PROMPTS)


def hunyuan_dit() -> Sample:
    transformer = seeded(HunyuanDiT2DModel, **DIT)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    vae = vaes.kl(scaling_factor=0.13025)
    pipe = HunyuanDiTPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **rest, **NO_TEXT)
    clip = {"prompt_embeds": noise(1, 77, 8), "prompt_attention_mask": ones(1, 77)}
    t5 = {"prompt_embeds_2": noise(1, 256, 8), "prompt_attention_mask_2": ones(1, 256)}
    size = {"height": 64, "width": 48, "use_resolution_binning": False}
    return run("hunyuan-dit", pipe, guidance_scale=1.0, **size, **clip, **t5)


SAMPLES = {
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-1.5": hunyuan_video_15,
    "hunyuan-image": hunyuan_image,
    "hunyuan-dit": hunyuan_dit,
}
