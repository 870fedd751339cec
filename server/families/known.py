"""Facts about well-known checkpoints, so that they can be described before they are downloaded. See known.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A well-known checkpoint.

    class_name: the diffusers class.
    licence: the name of its licence.
    decoder_weights, encoder_weights: the number of parameters that each direction needs.
    gated: downloading needs a token of an account that accepted the licence.
    config: the entries of config.json that differ from the defaults of the class.
    """

    class_name: str
    licence: str
    decoder_weights: int
    encoder_weights: int
    gated: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def known(repo: str, subfolder: str | None) -> Checkpoint | None:
    """Return the facts about a repository, or about its subfolder. None if it is not in the list."""
    return _all().get(f"{repo}:{subfolder}" if subfolder else repo)


@cache
def _all() -> dict[str, Checkpoint]:
    entries = yaml.safe_load((resources.files(__package__) / "known.yaml").read_text(encoding="utf-8"))
    return {name: Checkpoint(class_name=entry.pop("class"), **entry) for name, entry in entries.items()}
