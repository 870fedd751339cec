"""The well-known checkpoints: what is known of them before they are downloaded. known.yaml is the list."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """decoder_weights, encoder_weights: how many numbers each direction needs."""

    class_name: str
    licence: str
    decoder_weights: int
    encoder_weights: int
    gated: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def known(repo: str, subfolder: str | None) -> Checkpoint | None:
    return _all().get(f"{repo}:{subfolder}" if subfolder else repo)


@cache
def _all() -> dict[str, Checkpoint]:
    entries = yaml.safe_load((resources.files(__package__) / "known.yaml").read_text(encoding="utf-8"))
    return {name: Checkpoint(class_name=entry.pop("class"), **entry) for name, entry in entries.items()}
