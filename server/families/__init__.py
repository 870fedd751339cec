"""The VAE families this server knows. A new one is one file here and one entry in `FAMILIES`."""

from __future__ import annotations

from server.families.base import Family, check_limits
from server.families.flux import Flux
from server.families.hunyuan_video import HunyuanVideo
from server.families.kl import KL

FAMILIES: dict[str, Family] = {family.name: family for family in (KL(), Flux(), HunyuanVideo())}


def family_of_class(class_name: str) -> Family | None:
    """The family that a config.json's `_class_name` implies, None when no family claims it."""
    return next((family for family in FAMILIES.values() if class_name in family.class_names), None)


__all__ = ["FAMILIES", "Family", "check_limits", "family_of_class"]
