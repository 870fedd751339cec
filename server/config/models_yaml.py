"""Read models.yaml. An error names the file, the line and the key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import ConfigError
from ..model_info import Limits
from .mistakes import DECODER, DEVICE, FILE, expected, nearest
from .options import Dtype
from .paths import RESERVED

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"

Pixels = Annotated[int, Field(ge=64)]
PATH_STARTS = (".", "/", "~")
EMBEDDED = "embedded"  # the `repo` of the model that comes with the package
EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "demo"
KeyPath = tuple[str | int, ...]
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's names for a key that no field has
_LIMITS = {field.name: field for field in fields(Limits)}


class Strict(BaseModel):
    """The base of the configuration's classes: frozen, without unknown keys, without conversions of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelEntry(Strict):
    """One entry under `models`. docs/operations.md describes the keys."""

    repo: str = Field(min_length=1)
    subfolder: str | None = None
    file: str | None = Field(None, pattern=FILE)
    revision: str | None = None
    config: str | None = Field(None, min_length=1)
    family: str | None = None
    dtype: Dtype | None = None
    device: str | None = Field(None, pattern=DEVICE)
    decoder: str = Field("auto", pattern=DECODER)
    tiling: Literal["none", "diffusers"] = "none"
    fps: float | None = Field(None, gt=0, le=240)
    audio: str | None = None
    memory_budget_mb: int | None = Field(None, ge=1)
    preload: bool = False
    aliases: tuple[str, ...] = ()
    limits: Limits = Limits()
    warmup: tuple[tuple[Pixels, Pixels], ...] = ()

    @model_validator(mode="after")
    def _custom_decoders_have_no_tiles(self) -> Self:
        if self.custom_decoder and self.tiling != "none":
            raise ValueError("tiling is for diffusers' own decoder; leave it out beside a decoder of another package")
        return self

    @property
    def custom_decoder(self) -> str | None:
        """The class of an installed package that decodes, as `package.module:Class`; None for the server's own."""
        return self.decoder if ":" in self.decoder else None

    @property
    def decodes_exactly(self) -> bool:
        """Whether this server's own decoder, which is exact and faster, may be used instead of diffusers'."""
        return self.decoder == "auto" and self.tiling == "none"

    def local_path(self, base: Path) -> Path | None:
        """Return the folder or the file that `repo` names; None if it names a repository on the Hub.

        It names a path of this machine if it starts with `.`, `/` or `~`, or if such a path exists. `embedded` is the
        model that comes with the package.

        base: the folder of models.yaml, to which `repo` is relative.
        """
        if self.repo == EMBEDDED:
            return EMBEDDED_FOLDER
        path = resolved(self.repo, base)
        return path if self.repo.startswith(PATH_STARTS) or path.exists() else None

    def config_path(self, base: Path) -> Path | None:
        """Return the file or folder that `config` names; None if it is not set, or is the name of a configuration."""
        return resolved(self.config, base) if self.config and is_path(self.config) else None


def is_path(word: str) -> bool:
    """Return whether a word can only be the path of a file or folder, and not the name of a configuration."""
    return word.startswith(PATH_STARTS) or "/" in word or word.endswith(".json")


def resolved(word: str, base: Path) -> Path:
    """Return the path that a word names, relative to `base`, with `~` as the home of the user."""
    return (base / os.path.expanduser(word)).resolve()  # noqa: PTH111  # Path's raises for an unknown user


class ModelsFile(Strict):
    """The content of models.yaml. default: a name or an alias; None for the first model."""

    default: str | None = None
    models: dict[str, ModelEntry] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _names_can_be_routes(cls, models: dict[str, ModelEntry]) -> dict[str, ModelEntry]:
        seen: dict[str, str] = {}
        for name, entry in models.items():
            for word in (name, *entry.aliases):
                check_name(word)
                if seen.setdefault(word, name) != name or (word == name and word in entry.aliases):
                    raise ValueError(f"the name '{word}' is used twice, by '{seen[word]}' and '{name}'")
        for name, entry in models.items():
            if entry.audio is not None and entry.audio not in models:
                raise ValueError(f"'{name}' names the audio model '{entry.audio}', and there is no entry of that name")
        return models


def check_name(word: str) -> None:
    """Raise ValueError unless `word` can be the name of a model in a URL."""
    if not re.match(NAME_PATTERN, word):
        raise ValueError(
            f"'{word}' cannot be a model's name: use at most 64 characters from a-z, 0-9, '.', '_' and '-', "
            "and begin with a letter or a digit"
        )
    if word in RESERVED:
        raise ValueError(f"'{word}' cannot be a model's name: it is a route of the server")


def parse_models(source: Path) -> ModelsFile:
    """Read and check a models.yaml. Raises ConfigError."""
    try:
        node = yaml.compose(source.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        lines = _lines(node, source)
    except RecursionError:
        raise ConfigError(f"{source}: a YAML alias refers to a value that contains it") from None
    try:
        return ModelsFile.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(_sentence(error, source, lines)) from None
    except (TypeError, ValueError):
        raise ConfigError(
            f"{source}: a key is not a string; write names that look like dates or numbers in quotes"
        ) from None


def _lines(node: yaml.Node | None, source: Path, path: KeyPath = ()) -> dict[KeyPath, int]:
    """Return the line of every key and list item by its path. Raises ConfigError for a duplicate key."""
    lines = {path: node.start_mark.line + 1} if node else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, str(key.value))
            if place in lines:
                raise ConfigError(f"{source}:{key.start_mark.line + 1}: {_dotted(place)}: this key is there twice")
            lines |= _lines(value, source, place) | {place: key.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _lines(value, source, (*path, index))
    return lines


def _sentence(error: ValidationError, source: Path, lines: Mapping[KeyPath, int]) -> str:
    """Return the sentence about the first mistake. lines: the line of each key."""
    # Unknown keys come first, because a misspelt key often explains a missing one.
    first = min(error.errors(), key=lambda each: each["type"] not in UNKNOWN)
    place = tuple(first["loc"])
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    where = f"{source}:{line}: {_dotted(place) or 'the file'}"
    if first["type"] in UNKNOWN:
        known = list(_known_keys(place))
        return f"{where}: unknown key{nearest(str(place[-1]), known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: this key is required"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: {expected(first)}, got {first['input']!r}"


def _known_keys(place: KeyPath) -> Mapping[str, Any]:
    """Return the keys that are known where an unknown one was found."""
    if len(place) == 1:
        return ModelsFile.model_fields
    return _LIMITS if "limits" in place[2:-1] else ModelEntry.model_fields


def _dotted(place: KeyPath) -> str:
    return ".".join(map(str, place))
