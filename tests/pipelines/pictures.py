"""Other pipelines of pictures over an AutoencoderKL, none packed: latents `[B, C, H/8, W/8]`."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.pipelines.sample import Sample, noise, ones, run, seeded
from tests.pipelines.vaes import kl, kl16

SIZE = {"height": 64, "width": 48}
EMBEDS = {"prompt_embeds": noise(1, 4, 8)}
PROMPT = EMBEDS | {"prompt_attention_mask": ones(1, 4)}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = NO_TEXT | {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in (2, 3, 4)}
LUMINA2: dict[str, Any] = {
    "in_channels": 16,
    "hidden_size": 8,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 1,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (4, 2, 2),
    "cap_feat_dim": 8,
}
AURA_FLOW: dict[str, Any] = {
    "sample_size": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 8,
    "pos_embed_max_size": 64,
}
PIXART: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_channels": 8,
    "cross_attention_dim": 16,
}
Z_IMAGE: dict[str, Any] = {
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}
HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_channels": [8, 8],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (8, 8),
    "llama_layers": (0, 1),
}
COGVIEW: dict[str, Any] = {
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def lumina2() -> Sample:
    parts = {"transformer": seeded(Lumina2Transformer2DModel, **LUMINA2), "vae": kl16()}
    pipe = Lumina2Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **NO_TEXT)
    return run("lumina2", pipe, guidance_scale=1.0, **SIZE, **PROMPT)


def aura_flow() -> Sample:
    parts = {"transformer": seeded(AuraFlowTransformer2DModel, **AURA_FLOW), "vae": kl(scaling_factor=0.13025)}
    pipe = AuraFlowPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **NO_TEXT)
    return run("aura-flow", pipe, guidance_scale=1.0, **SIZE, **PROMPT)


def pixart(name: str, pipeline: Any, **config: Any) -> Sample:
    parts = {"transformer": seeded(PixArtTransformer2DModel, **PIXART), "vae": kl(**config)}
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = pipeline(scheduler=scheduler, **parts, **NO_TEXT)
    inputs = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 1.0}
    return run(name, pipe, **inputs, **SIZE, **PROMPT)


def z_image() -> Sample:
    parts = {"transformer": seeded(ZImageTransformer2DModel, **Z_IMAGE), "vae": kl16()}
    pipe = ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **NO_TEXT)
    return run("z-image", pipe, guidance_scale=0.0, prompt_embeds=[noise(4, 8)], **SIZE)


def hidream() -> Sample:
    """The pipeline makes pictures of its default size alone, 1024x1024 pixels or as many in another shape."""
    parts = {"transformer": seeded(HiDreamImageTransformer2DModel, **HIDREAM), "vae": kl16()}
    pipe = HiDreamImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **NO_TEXTS)
    pipe.default_sample_size = 8
    prompt = {
        "prompt_embeds_t5": noise(1, 4, 8),
        "prompt_embeds_llama3": noise(2, 1, 4, 8),
        "pooled_prompt_embeds": noise(1, 8),
    }
    return run("hidream", pipe, guidance_scale=0.0, height=64, width=64, **prompt)


def cogview3() -> Sample:
    config = COGVIEW | {"in_channels": 16, "out_channels": 16, "pos_embed_max_size": 8, "sample_size": 8}
    parts = {"transformer": seeded(CogView3PlusTransformer2DModel, **config), "vae": kl(latent_channels=16)}
    pipe = CogView3PlusPipeline(scheduler=CogVideoXDDIMScheduler(), **parts, **NO_TEXT)
    return run("cogview3", pipe, guidance_scale=1.0, **SIZE, **EMBEDS)


def cogview4() -> Sample:
    config = COGVIEW | {"in_channels": 16, "out_channels": 16, "rope_axes_dim": (64, 64)}
    parts = {"transformer": seeded(CogView4Transformer2DModel, **config), "vae": kl(latent_channels=16)}
    pipe = CogView4Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **NO_TEXT)
    return run("cogview4", pipe, guidance_scale=1.0, **SIZE, **EMBEDS)


SAMPLES = {
    "lumina2": lumina2,
    "aura-flow": aura_flow,
    "pixart-alpha": lambda: pixart("pixart-alpha", PixArtAlphaPipeline),
    "pixart-sigma": lambda: pixart("pixart-sigma", PixArtSigmaPipeline, scaling_factor=0.13025),
    "z-image": z_image,
    "hidream": hidream,
    "cogview3": cogview3,
    "cogview4": cogview4,
}
