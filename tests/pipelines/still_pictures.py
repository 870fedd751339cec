"""Pictures of pipelines whose transformer stands still: the part after it is compared."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFibo2Pipeline,
    BriaFiboPipeline,
    BriaPipeline,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    HunyuanImageRefinerPipeline,
    LongCatImagePipeline,
    OvisImagePipeline,
    PRXPipeline,
)

from tests.pipelines import vaes
from tests.pipelines.encoding import bare
from tests.pipelines.sample import Sample, noise, ones, run
from tests.pipelines.still import Still

SIZE: dict[str, Any] = {"height": 64, "width": 48}
EMBEDS = noise(1, 4, 8)


def pipeline(kind: Any, vae: Any, transformer: Still, **parts: Any) -> Any:
    return bare(kind, vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def glm_image() -> Sample:
    """Means and deviations, and a scaling factor that the pipeline does not use."""
    vae = vaes.kl16(scaling_factor=0.5, shift_factor=None, mid_block_add_attention=False, **vaes.statistics(16))
    pipe = pipeline(GlmImagePipeline, vae, Still(in_channels=16, patch_size=2, num_layers=1))
    pipe.check_inputs = lambda *_, **__: None  # it wants sizes of 32 pixels and more tokens than are needed here
    prior = torch.zeros(1, 12, dtype=torch.long)
    return run("glm-image", pipe, prompt_embeds=EMBEDS, prior_token_ids=prior, guidance_scale=1.0, height=64, width=64)


def refiner() -> Sample:
    pipe = pipeline(HunyuanImageRefinerPipeline, vaes.hunyuan_image_refiner(), Still(64, in_channels=128))
    image = 2 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) - 1
    prompt = {"prompt_embeds": EMBEDS, "prompt_embeds_mask": ones(1, 4)}
    return run("hunyuan-image-refiner", pipe, image=image, height=64, width=96, **prompt)


def fibo() -> Sample:
    pipe = pipeline(BriaFiboPipeline, vaes.wan_22(), Still(in_channels=48, num_layers=1, num_single_layers=1))
    pipe.transformer.transformer_blocks = pipe.transformer.single_transformer_blocks = [None]
    encoded = (EMBEDS, None, torch.zeros(4, 3), ones(1, 4), None, [EMBEDS, EMBEDS], None)
    pipe.encode_prompt = lambda **_: encoded
    return run("fibo", pipe, is_packed=True, prompt="{}", guidance_scale=1.0, height=64, width=96)


def fibo2() -> Sample:
    pipe = pipeline(BriaFibo2Pipeline, vaes.flux2(), Still(in_channels=32, patch_size=2))
    prompt = {"prompt_embeds": EMBEDS, "prompt_embeds_mask": ones(1, 4)}
    return run("fibo2", pipe, guidance_scale=1.0, **SIZE, **prompt)


def ovis_image() -> Sample:
    pipe = pipeline(OvisImagePipeline, vaes.kl16(), Still(in_channels=64, patch_size=1))
    return run("ovis-image", pipe, is_packed=True, prompt_embeds=EMBEDS, guidance_scale=1.0, **SIZE)


def longcat_image() -> Sample:
    pipe = pipeline(LongCatImagePipeline, vaes.kl16(), Still(in_channels=64))
    pipe.encode_prompt = lambda **_: (EMBEDS, torch.zeros(4, 3))
    inputs = {"prompt": "", "guidance_scale": 1.0, "enable_prompt_rewrite": False}
    return run("longcat-image", pipe, is_packed=True, **SIZE, **inputs)


def bria() -> Sample:
    vae = vaes.kl(scaling_factor=0.13025, shift_factor=0.1)
    pipe = pipeline(BriaPipeline, vae, Still(in_channels=16))
    inputs = {"guidance_scale": 1.0, "height": 64, "width": 96}
    return run("bria", pipe, is_packed=True, prompt_embeds=EMBEDS, **inputs)


def prx() -> Sample:
    pipe = pipeline(PRXPipeline, vaes.kl16(), Still(in_channels=16, patch_size=2))
    mask = torch.ones(1, 4, dtype=torch.bool)
    inputs = {"prompt_attention_mask": mask, "guidance_scale": 1.0, "use_resolution_binning": False}
    return run("prx", pipe, prompt_embeds=EMBEDS, **SIZE, **inputs)


SAMPLES = {
    "glm-image": glm_image,
    "hunyuan-image-refiner": refiner,
    "fibo": fibo,
    "fibo2": fibo2,
    "ovis-image": ovis_image,
    "longcat-image": longcat_image,
    "bria": bria,
    "prx": prx,
}
