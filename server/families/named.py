"""The well-known configurations that `config` in models.yaml may name.

They are those of the models of the shipped models.yaml, and of the files of tiny video VAEs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..config import shipped_models
from .known import known
from .tiny_video import CONFIGS


@dataclass(frozen=True, slots=True)
class NamedConfig:
    """The configuration of a well-known VAE, for a file that comes without a config.json.

    name: the first of its names. names: all of them. family: the name of its family, if its class does not tell it.
    config: a config.json, with `_class_name`. `force_upcast` is left out, because it tells of the weights whether they
        overflow in float16, and the file may have others.
    """

    name: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    family: str | None = None


def named_config(word: str) -> NamedConfig | None:
    """Return the configuration with this name, in any case; None if there is none."""
    return next((each for each in named_configs() if word.lower() in each.names), None)


@cache
def named_configs() -> tuple[NamedConfig, ...]:
    """Return all well-known configurations."""
    found = []
    for name, entry in shipped_models().items():
        if (checkpoint := known(entry.repo, entry.subfolder, entry.file)) is None:
            continue
        config = {"_class_name": checkpoint.class_name, **checkpoint.config}
        config.pop("force_upcast", None)
        found.append(NamedConfig(name, (name, *entry.aliases), config, entry.family))
    given = {word for each in found for word in each.names}
    found += [NamedConfig(name, (name,), config) for name, config in CONFIGS.items() if name not in given]
    return tuple(found)
