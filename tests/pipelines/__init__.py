"""The oracle: what real diffusers pipelines of small seeded components make, to compare the server with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tests.pipelines import (
    clips,
    cosmos,
    hunyuan,
    kandinsky,
    ltx,
    ltx2,
    mmdit,
    patched,
    pictures,
    qwen_image_21,
    sana,
    stable_diffusion,
    stable_video,
    wan,
)
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
)
SAMPLES: dict[str, Callable[[], Sample]] = {name: cache(make) for file in FILES for name, make in file.SAMPLES.items()}

__all__ = ["SAMPLES", "Sample"]
