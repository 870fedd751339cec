"""Make entries of models out of what is given on the command line: a file, a folder, or a repository of the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from .models_yaml import NAME_PATTERN, PATH_STARTS, ModelEntry, is_path, resolved
from .paths import RESERVED

WEIGHTS = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # these are refused later, with a sentence that says what to do
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def entry_of(word: str, known: Mapping[str, ModelEntry], vae_config: str | None) -> tuple[str, ModelEntry] | None:
    """Return a name and an entry for a word of the command line; None if it can only be the name of a model.

    known: the models of models.yaml. One of the same repository gives its other keys.
    vae_config: the value of `--vae-config`. Raises ConfigError if a path does not exist or contains no VAE.
    """
    if any(word.lower() in (name, *entry.aliases) for name, entry in known.items()):
        return None
    path = resolved(word, Path.cwd())
    if path.exists() or word.startswith(PATH_STARTS) or word.endswith((*WEIGHTS, *PICKLES)):
        if not path.exists():
            raise ConfigError(f"{word}: no such file or folder")
        if path.is_dir() and vae_at(path) is None:
            hint = f"; for its models.yaml, write --config {word}" if (path / "models.yaml").is_file() else ""
            raise ConfigError(f"{word} contains no config.json of a diffusers VAE and no safetensors file{hint}")
        entry = ModelEntry(repo=str(path))
    elif HUB_ID.fullmatch(word):
        entry = next((each for each in known.values() if each.repo == word), ModelEntry(repo=word))
        entry = entry.model_copy(update={"aliases": ()})
    else:
        return None
    config = absolute(vae_config) if vae_config else entry.config
    return _name_of(Path(word if "/" in word else path.name), known), entry.model_copy(update={"config": config})


def _name_of(path: Path, known: Mapping[str, ModelEntry]) -> str:
    """Return a name for a model that can be a route: the last part of its path in lower case, without its suffix."""
    stem = path.name.removesuffix(path.suffix) if path.suffix in (*WEIGHTS, *PICKLES) else path.name
    name = re.sub("[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:60]
    if not re.match(NAME_PATTERN, name):
        name = "model"
    taken = RESERVED | {word for key, entry in known.items() for word in (key, *entry.aliases)}
    return f"my-{name}" if name in taken else name


def vae_at(path: Path) -> Path | None:
    """Return the file or folder of the VAE at a path; None if there is none, as at a models.yaml.

    A folder is one of a VAE if it has a config.json of diffusers, or safetensors files and no models.yaml. A folder of
    a pipeline has its VAE in the subfolder vae.
    """
    if not path.is_dir():
        return path if path.suffix in (*WEIGHTS, *PICKLES) else None
    for vae in (path, path / "vae"):
        if _is_of_diffusers(vae / "config.json"):
            return vae
    has_models = (path / "models.yaml").is_file()
    return path if not has_models and any(file.suffix in (*WEIGHTS, *PICKLES) for file in path.iterdir()) else None


def _is_of_diffusers(config: Path) -> bool:
    """Return whether this is the config.json of a diffusers model, and not, for example, of a text encoder."""
    return config.is_file() and b"_class_name" in config.read_bytes()


def absolute(vae_config: str) -> str:
    """Return the value of `--vae-config` so that it does not depend on the working folder."""
    return str(resolved(vae_config, Path.cwd())) if is_path(vae_config) else vae_config
