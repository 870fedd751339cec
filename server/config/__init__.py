"""The configuration: models.yaml, VAE_SERVER_* and flags become one frozen Settings. Mistakes raise ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from ..errors import ConfigError
from .keys import ApiKey, forget_keys, read_keys
from .mistakes import nearest
from .models_yaml import ModelEntry, ModelsFile, Strict, check_name, parse_models
from .options import REFUSED_SHARE, SLOWEST_BYTES_PER_S, USUAL_FPS, ServerOptions, read_options

SHIPPED_MODELS_YAML = Path(__file__).resolve().parent.parent.parent / "models.yaml"
MOUNTED = (Path("/repository"), Path("/opt/ml/model"))  # Inference Endpoints and SageMaker put a model there


class Settings(Strict):
    """The whole configuration, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    options: ServerOptions
    source: Path
    default: str
    models: dict[str, ModelEntry]
    api_keys: tuple[ApiKey, ...] = ()

    def name_of(self, word: str) -> str | None:
        """The model that a name or an alias means, whatever its case."""
        word = word.lower()
        return next((name for name, entry in self.models.items() if word in (name, *entry.aliases)), None)

    def fps_of(self, name: str) -> float:
        """Return the frames per second of a model's MP4s where a request does not say them."""
        return self.options.fps or self.models[name].fps or USUAL_FPS

    def folder_of(self, name: str) -> Path | None:
        return self.models[name].local_folder(self.source.parent)


def load_settings(only: tuple[str, ...] = (), **flags: Any) -> Settings:
    """Flags over environment over models.yaml over defaults.

    only: names or aliases to keep, preloaded; the first becomes the default. Raises ConfigError.
    """
    options = read_options({key: value for key, value in flags.items() if value is not None})
    try:
        source, file = _models_of(_source(options.config))
    except OSError as error:
        reason = f"{error.strerror}; the user of this process must be able to read it"
        raise ConfigError(f"{error.filename or options.config}: {reason}") from None
    names = list(file.models)
    default = file.default or names[0]
    settings = Settings(
        options=options, source=source, default=default, models=file.models, api_keys=read_keys(options)
    )
    known = settings.name_of(default)
    if known is None:
        raise ConfigError(
            f"{source}: default: no model '{default}'{nearest(default, names)}; known: {', '.join(names)}"
        )
    if not only:
        return settings.model_copy(update={"default": known})
    kept = []
    for word in only:
        name = settings.name_of(word)
        if name is None:
            raise ConfigError(f"no model '{word}' in {source}{nearest(word, names)}; known: {', '.join(names)}")
        kept.append(name)
    # Who names a model wants it ready, not at its first request.
    models = {name: file.models[name].model_copy(update={"preload": True}) for name in kept}
    return settings.model_copy(update={"default": kept[0], "models": models})


def _source(chosen: Path | None) -> Path:
    """A models.yaml or a folder."""
    if chosen is None:
        mounted = (folder for folder in MOUNTED if folder.is_dir() and any(folder.iterdir()))
        here = (file for file in (Path("models.yaml"),) if file.is_file())
        return next(iter((*mounted, *here, SHIPPED_MODELS_YAML))).resolve()
    if not chosen.exists():
        raise ConfigError(f"{chosen}: no such file; --config names a models.yaml, or a folder with one or with a VAE")
    return chosen.resolve()


def _is_vae(folder: Path) -> bool:
    """Whether its config.json is a model's of diffusers, not, say, a text encoder's."""
    config = folder / "config.json"
    return config.is_file() and b"_class_name" in config.read_bytes()


def _models_of(source: Path) -> tuple[Path, ModelsFile]:
    """The file or folder that names them, and the models: of a folder with a VAE that one alone, to load at start."""
    if not source.is_dir():
        return source, parse_models(source)
    for vae in (source, source / "vae"):
        if _is_vae(vae):
            return source, ModelsFile(models={"model": ModelEntry(repo=str(vae), preload=True)})
    if (file := source / "models.yaml").is_file():
        return file, parse_models(file)
    raise ConfigError(
        f"{source} has no config.json of a diffusers VAE, no vae/config.json and no models.yaml; put one of them there"
    )


__all__ = [
    "REFUSED_SHARE",
    "SLOWEST_BYTES_PER_S",
    "USUAL_FPS",
    "ApiKey",
    "ModelEntry",
    "ServerOptions",
    "Settings",
    "check_name",
    "forget_keys",
    "load_settings",
]
