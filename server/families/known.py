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

    class_name: the class, which is one of diffusers unless the family is TAEHV.
    licence: the name of its licence.
    decoder_weights, encoder_weights: the number of parameters that each direction needs.
    gated: downloading needs a token of an account that accepted the licence.
    config: the entries of config.json that differ from the defaults of the class.
    companion: entries of the config.json of the family's `companion`; empty if the family has none.
    source: where these facts come from; None for diffusers' conversion scripts and class defaults.
    unverified: the facts that were not compared with the repository: "licence", "gated", "config".
    shared_by: repositories that are said to contain the same VAE, each as "REPO:SUBFOLDER".
    """

    class_name: str
    licence: str
    decoder_weights: int
    encoder_weights: int
    gated: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    companion: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    unverified: list[str] = field(default_factory=list)
    shared_by: list[str] = field(default_factory=list)


def known(repo: str, subfolder: str | None, file: str | None = None) -> Checkpoint | None:
    """Return the facts about a repository, its subfolder, or a file of either. None if it is not in the list."""
    place = "/".join(part for part in (subfolder, file) if part)
    return _all().get(f"{repo}:{place}" if place else repo)


@cache
def _all() -> dict[str, Checkpoint]:
    entries = yaml.safe_load((resources.files(__package__) / "known.yaml").read_text(encoding="utf-8"))
    return {name: Checkpoint(class_name=entry.pop("class"), **entry) for name, entry in entries.items()}


def all_known() -> dict[str, Checkpoint]:
    """Return all checkpoints, by their repository, "REPO:SUBFOLDER", "REPO:FILE" or "REPO:SUBFOLDER/FILE"."""
    return dict(_all())
