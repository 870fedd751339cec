"""The oracle: what real diffusers pipelines of small seeded components make, to compare the server with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tests.pipelines import (
    clips,
    cosmos,
    flux2_relatives,
    hunyuan,
    kandinsky,
    kvae,
    ltx,
    ltx2,
    minimax_h3,
    mmdit,
    patched,
    pictures,
    qwen_image_21,
    qwen_relatives,
    sana,
    stable_diffusion,
    stable_video,
    still_clips,
    still_pictures,
    wan,
)
from tests.pipelines.clip_to_latents import CLIP_TO_LATENTS
from tests.pipelines.image_to_latents import PICTURE_TO_LATENTS
from tests.pipelines.sample import Sample

FILES = (
    stable_diffusion,
    mmdit,
    pictures,
    patched,
    qwen_image_21,
    sana,
    wan,
    hunyuan,
    ltx,
    ltx2,
    clips,
    cosmos,
    kandinsky,
    stable_video,
    minimax_h3,
    kvae,
    flux2_relatives,
    qwen_relatives,
    still_pictures,
    still_clips,
)
SAMPLES: dict[str, Callable[[], Sample]] = {name: cache(make) for file in FILES for name, make in file.SAMPLES.items()}

IMAGE_TO_LATENTS = PICTURE_TO_LATENTS | CLIP_TO_LATENTS
"""By the name of the sample whose VAE the pipeline takes."""

__all__ = ["IMAGE_TO_LATENTS", "SAMPLES", "Sample"]
