"""LTX-2: a clip with sound, whose latents the pipeline unpacks and unscales before it returns them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoDiffusionDecodePipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.modular_pipelines.ltx2.decoders import LTX2DiffusionVaeDecoderStep
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, ones, quiet, run, run_block, seeded

ROPE = {"rope_double_precision": False, "rope_type": "split"}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 1,
    "caption_channels": 32,
}
CONNECTORS: dict[str, Any] = {
    "caption_channels": 32,
    "text_proj_in_factor": 2,
    "video_connector_num_attention_heads": 4,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 1,
    "video_connector_num_learnable_registers": None,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": None,
    "connector_rope_base_seq_len": 32,
}
AUDIO: dict[str, Any] = {
    "base_channels": 4,
    "ch_mult": (1,),
    "num_res_blocks": 1,
    "latent_channels": 2,
    "mel_bins": 8,
    "resolution": 32,
    "mid_block_add_attention": False,
}
VOCODER: dict[str, Any] = {
    "in_channels": 16,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [4, 4],
    "upsample_factors": [2, 2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3, 5]],
    "output_sampling_rate": 400,
}
UNGUIDED = {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}


INPUTS: dict[str, Any] = {
    **{"height": 96, "width": 64, "num_frames": 9},
    **{"prompt_embeds": noise(1, 4, 64), "prompt_attention_mask": ones(1, 4)},
    **UNGUIDED,
    "audio_stg_scale": 0.0,
}


def pipeline(vae: Any) -> LTX2Pipeline:
    """The whole pipeline, with sound."""
    sound = {"audio_vae": seeded(AutoencoderKLLTX2Audio, **AUDIO), "vocoder": seeded(LTX2Vocoder, **VOCODER)}
    parts = {
        "transformer": seeded(LTX2VideoTransformer3DModel, **TRANSFORMER, **ROPE),
        "connectors": seeded(LTX2TextConnectors, **CONNECTORS, **ROPE),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    return LTX2Pipeline(vae=vae, text_encoder=None, tokenizer=None, **parts, **sound)


def ltx2(name: str, vae: Any) -> Sample:
    return run(name, pipeline(vae), are_scaled=False, **INPUTS)


def diffusion_packed() -> Sample:
    """The pipeline's latents inside its loop: packed and scaled."""
    size = {"height": 96, "width": 128, "num_frames": 9, "dtype": torch.float32}
    inputs = {"diffusion_decoder": vaes.ltx2_diffusion(), "generator": torch.Generator().manual_seed(0), **size}
    return run_block("ltx2-diffusion", LTX2DiffusionVaeDecoderStep(), noise(1, 24, 16), is_packed=True, **inputs)


def diffusion_unpacked() -> Sample:
    """The latents that an LTX-2 pipeline returns: unpacked and unscaled."""
    decoder = vaes.ltx2_diffusion()
    pipe = LTX2VideoDiffusionDecodePipeline(diffusion_decoder=decoder, scheduler=FlowMatchEulerDiscreteScheduler())
    latents, seed = noise(1, 16, 2, 3, 4), torch.Generator().manual_seed(0)
    with quiet():
        pixels = pipe(latents, generator=seed, output_type="pt", denormalize=False).frames
    return Sample("ltx2-diffusion-unpacked", decoder, latents, pixels, 96, 128, 9, is_packed=False, are_scaled=False)


SAMPLES = {
    "ltx2": lambda: ltx2("ltx2", vaes.ltx2()),
    "ltx2.3": lambda: ltx2("ltx2.3", vaes.ltx23()),
    "ltx2-diffusion": diffusion_packed,
    "ltx2-diffusion-unpacked": diffusion_unpacked,
}
