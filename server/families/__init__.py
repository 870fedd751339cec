"""The VAE families this server knows. A new one is one class in a file here and one entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.families.base import Family, check_limits
from server.families.cogvideox import CogVideoX
from server.families.flux import Flux
from server.families.flux2 import Flux2
from server.families.hunyuan_video import HunyuanVideo
from server.families.kl import KL
from server.families.ltx import LTX, LTX2
from server.families.more_images import DC, HunyuanImage, Tiny
from server.families.more_video import Allegro, Cosmos, HunyuanVideo15, Magvit, Mochi
from server.families.plain import PlainImage, PlainVideo, is_video
from server.families.qwen_image import QwenImage, QwenImage21
from server.families.stable_video import StableVideo
from server.families.wan import Wan

PICTURES: tuple[Family, ...] = (KL(), Flux(), Flux2(), QwenImage(), QwenImage21(), HunyuanImage(), DC(), Tiny())
CLIPS: tuple[Family, ...] = (
    *(Wan(), HunyuanVideo(), HunyuanVideo15(), LTX(), LTX2(), CogVideoX(), Mochi(), Cosmos(), StableVideo()),
    *(Allegro(), Magvit()),
)
PLAIN: tuple[Family, ...] = (PlainImage(), PlainVideo())
FAMILIES: dict[str, Family] = {family.name: family for family in (*PICTURES, *CLIPS, *PLAIN)}


def family_of_class(class_name: str) -> Family | None:
    """The family that a config.json's `_class_name` implies, None when no family claims it."""
    return next((family for family in FAMILIES.values() if class_name in family.class_names), None)


def plain_family(config: Mapping[str, Any]) -> Family:
    """The family of `decoder: plain`, for any class of diffusers."""
    return FAMILIES["plain_video" if is_video(config) else "plain"]


__all__ = ["FAMILIES", "Family", "check_limits", "family_of_class", "plain_family"]
