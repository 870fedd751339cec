"""Clips of pipelines whose transformer stands still: the part after it is compared."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnyFlowPipeline,
    ChronoEditPipeline,
    Cosmos2_5_PredictBasePipeline,
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    MotifVideoPipeline,
    SanaVideoPipeline,
    SanaWMPipeline,
    SkyReelsV2Pipeline,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.modular_pipelines.cosmos.decoders import Cosmos3VideoDecodeStep
from diffusers.modular_pipelines.helios.decoders import HeliosDecodeStep
from PIL import Image

from tests.pipelines import vaes
from tests.pipelines.cosmos import Unguarded
from tests.pipelines.encoding import bare
from tests.pipelines.sample import Sample, noise, ones, quiet, run, run_block
from tests.pipelines.still import Still

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}
EMBEDS = noise(1, 4, 8)
UNCHECKED = {"enable_safety_checker": False}
UNGUIDED = {"guidance_scale": 1.0, "prompt_embeds": EMBEDS}


def pipeline(kind: Any, vae: Any, transformer: Still, **parts: Any) -> Any:
    return bare(kind, vae, **{"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()} | parts)


def anyflow() -> Sample:
    pipe = pipeline(AnyFlowPipeline, vaes.wan(), Still(in_channels=16))
    return run("anyflow", pipe, **SIZE, **UNGUIDED)


def chrono_edit() -> Sample:
    transformer = Still(16, in_channels=16, patch_size=(1, 2, 2), image_dim=None)
    pipe = pipeline(ChronoEditPipeline, vaes.wan(), transformer)
    pipe.encode_image = lambda *_: EMBEDS
    return run("chrono-edit", pipe, image=noise(1, 3, 64, 96), **SIZE, **UNGUIDED)


def motif_video() -> Sample:
    pipe = pipeline(
        MotifVideoPipeline,
        vaes.wan(),
        Still(16, in_channels=33, patch_size=2, patch_size_t=1),
        guider=AdaptiveProjectedGuidance(enabled=False),
    )
    prompt = {"prompt_embeds": EMBEDS, "prompt_attention_mask": ones(1, 4)}
    return run("motif-video", pipe, **SIZE, **prompt)


def skyreels() -> Sample:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = pipeline(SkyReelsV2Pipeline, vaes.wan(), Still(in_channels=16), scheduler=scheduler)
    return run("skyreels-v2", pipe, **SIZE, **UNGUIDED)


def lucy() -> Sample:
    """Wan 2.2 5B's VAE."""
    pipe = pipeline(LucyEditPipeline, vaes.wan_22(), Still(48, in_channels=96, out_channels=48, patch_size=(1, 2, 2)))
    video = [Image.new("RGB", (96, 64), (10 * number, 40, 90)) for number in range(9)]
    return run("lucy-edit", pipe, video=video, **SIZE, **UNGUIDED)


def cosmos25() -> Sample:
    pipe = pipeline(Cosmos2_5_PredictBasePipeline, vaes.wan(), Still(16, in_channels=17), safety_checker=Unguarded())
    return run("cosmos-2.5", pipe, **SIZE, **UNGUIDED)


def cosmos3() -> Sample:
    return run_block("cosmos-3", Cosmos3VideoDecodeStep(), noise(1, 48, 3, 4, 6), vae=vaes.wan_22(), config=UNCHECKED)


def helios() -> Sample:
    """One chunk; a video of several is decoded chunk by chunk."""
    latents = noise(1, 16, 3, 8, 12)
    return run_block("helios", HeliosDecodeStep(), latents, vae=vaes.wan(), latent_chunks=[latents], num_frames=9)


def sana_video_ltx2() -> Sample:
    pipe = pipeline(SanaVideoPipeline, vaes.ltx2(), Still(in_channels=16, out_channels=16, patch_size=(1, 1, 1)))
    size = {"height": 96, "width": 64, "frames": 9, "use_resolution_binning": False}
    return run("sana-video-ltx2", pipe, prompt_attention_mask=ones(1, 4), **size, **UNGUIDED)


def sana_wm() -> Sample:
    """Its `__call__` starts with a camera path; this is the method that decodes."""
    vae, latents = vaes.ltx2(scaling_factor=1.25), noise(1, 16, 2, 3, 2)
    pipe = bare(SanaWMPipeline, vae, transformer=Still())
    with torch.no_grad(), quiet():
        pixels = pipe.video_processor.postprocess_video(pipe._decode_latents(latents), output_type="pt")
    return Sample("sana-wm", vae, latents, pixels, 96, 64, 9, is_packed=False, are_scaled=True)


SAMPLES = {
    "chrono-edit": chrono_edit,
    "motif-video": motif_video,
    "anyflow": anyflow,
    "skyreels-v2": skyreels,
    "lucy-edit": lucy,
    "cosmos-2.5": cosmos25,
    "cosmos-3": cosmos3,
    "helios": helios,
    "sana-video-ltx2": sana_video_ltx2,
    "sana-wm": sana_wm,
}
