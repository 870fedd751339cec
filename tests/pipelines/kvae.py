"""KVAE: no pipeline of diffusers 0.42 takes it, so that its decode is the reference."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise


def kvae(name: str, vae: Any, latents: torch.Tensor) -> Sample:
    with torch.no_grad():
        sample = vae.decode(latents).sample
    is_clip = sample.ndim == 5
    postprocess = VideoProcessor().postprocess_video if is_clip else VaeImageProcessor().postprocess
    return Sample(
        name=name,
        vae=vae,
        latents=latents,
        pixels=postprocess(sample, output_type="pt"),
        height=sample.shape[-2],
        width=sample.shape[-1],
        num_frames=sample.shape[2] if is_clip else 1,
        is_packed=False,
        are_scaled=False,
    )


SAMPLES = {
    "kvae": lambda: kvae("kvae", vaes.kvae(), noise(1, 16, 8, 6)),
    "kvae-video": lambda: kvae("kvae-video", vaes.kvae_video(), noise(1, 16, 7, 4, 6)),  # 25 frames: two segments
}
