"""Read the configuration from models.yaml, environment variables and flags into one frozen Settings.

Every mistake in the configuration raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from ..errors import ConfigError
from .keys import ApiKey, forget_keys, read_keys
from .mistakes import nearest
from .models_yaml import ModelEntry, ModelsFile, Strict, check_name, parse_models
from .on_disk import absolute, entry_of, vae_at
from .options import REFUSED_SHARE, SLOWEST_BYTES_PER_S, USUAL_FPS, ServerOptions, read_options
from .tls import tls_context

# In an installed package, models.yaml is inside it; in the repository, beside it.
PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED_MODELS_YAML = next(
    (file for folder in (PACKAGE, PACKAGE.parent) if (file := folder / "models.yaml").is_file()),
    PACKAGE / "models.yaml",
)
MOUNTED = (Path("/repository"), Path("/opt/ml/model"))  # where Inference Endpoints and SageMaker mount a model


class Settings(Strict):
    """The whole configuration, which has been checked.

    options: the options of `serve`.
    source: the models.yaml, or the folder with a VAE.
    default: the name of the model at POST /.
    models: the models by name.
    api_keys: the accepted keys; without any, every client is accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    options: ServerOptions
    source: Path
    default: str
    models: dict[str, ModelEntry]
    api_keys: tuple[ApiKey, ...] = ()

    def name_of(self, word: str) -> str | None:
        """Return the name of the model that has this name or alias, in any case; None if there is none."""
        word = word.lower()
        return next((name for name, entry in self.models.items() if word in (name, *entry.aliases)), None)

    def fps_of(self, name: str) -> float:
        """Return the frames per second of a model's MP4s, for requests that do not set them."""
        return self.options.fps or self.models[name].fps or USUAL_FPS

    def refusal_of(self, name: str) -> str | None:
        """Return why the decoder of a model may not run, as the end of a sentence; None if it may."""
        decoder = self.models[name].custom_decoder
        if decoder is None or self.options.allow_custom_decoders:
            return None
        return (
            f"decoder: {decoder} is code of an installed package, which the server runs only if it is started with "
            "--allow-custom-decoders"
        )

    def path_of(self, name: str) -> Path | None:
        """Return the local folder or file of a model; None if it is on the Hub."""
        return self.models[name].local_path(self.source.parent)

    def config_path_of(self, name: str) -> Path | None:
        """Return the file or folder that a model's `config` names; None if it names a well-known configuration."""
        return self.models[name].config_path(self.source.parent)


@cache
def shipped_models() -> Mapping[str, ModelEntry]:
    """Return the models of the models.yaml that comes with the server. Raises ConfigError."""
    return parse_models(SHIPPED_MODELS_YAML).models


def load_settings(only: tuple[str, ...] = (), **flags: Any) -> Settings:
    """Read the configuration. Flags take precedence over environment variables, and these over defaults.

    only: names or aliases of models, paths of files or folders with a VAE, or ids of repositories of the Hub. If given,
        the settings contain only these models, all of them with `preload`, and the first one is the default. The audio
        models that they name are there too.
    flags: options of `serve`; None counts as not given.

    Raises ConfigError.
    """
    options = read_options({key: value for key, value in flags.items() if value is not None})
    try:
        source, file = _models_of(_source(options.config), options.vae_config)
        given = {word: entry_of(word, file.models, options.vae_config) for word in only}
    except OSError as error:
        reason = f"{error.strerror}; the user of this process must be able to read it"
        raise ConfigError(f"{error.filename or options.config}: {reason}") from None
    models = {**file.models, **dict(found for found in given.values() if found is not None)}
    names = list(file.models)
    default = file.default or names[0]
    tls_context(options)  # raises ConfigError
    settings = Settings(options=options, source=source, default=default, models=models, api_keys=read_keys(options))
    if options.vae_config and vae_at(source) is None and not any(given.values()):
        raise ConfigError(
            "--vae-config is for a file, a folder or a repository that is named on the command line; "
            f"for a model of {source}, write config into its entry"
        )
    known = settings.name_of(default)
    if known is None:
        raise ConfigError(
            f"{source}: default: there is no model '{default}'{nearest(default, names)}; known: {', '.join(names)}"
        )
    if not only:
        return settings.model_copy(update={"default": known})
    kept = []
    for word in only:
        found = given[word]
        name = found[0] if found else settings.name_of(word)
        if name is None:
            raise ConfigError(
                f"there is no model '{word}' in {source}{nearest(word, names)}; known: {', '.join(names)}; "
                "a file or folder is written with its path, such as ./vae.safetensors"
            )
        kept.append(name)
    # A model that is named should be ready at the start, not at its first request.
    chosen = {name: models[name].model_copy(update={"preload": True}) for name in kept}
    sounds = {entry.audio: models[entry.audio] for entry in chosen.values() if entry.audio}
    added = {name: entry for name, entry in sounds.items() if name not in chosen}
    return settings.model_copy(update={"default": kept[0], "models": chosen | added})


def _source(chosen: Path | None) -> Path:
    """Return the models.yaml, or the file or folder of a VAE, to read. chosen: `--config`. Raises ConfigError."""
    if chosen is None:
        mounted = (folder for folder in MOUNTED if folder.is_dir() and any(folder.iterdir()))
        here = (file for file in (Path("models.yaml"),) if file.is_file())
        return next(iter((*mounted, *here, SHIPPED_MODELS_YAML))).resolve()
    if not chosen.exists():
        raise ConfigError(
            f"{chosen}: no such file; --config must name a models.yaml, a file of a VAE, or a folder that contains one"
        )
    return chosen.resolve()


def _models_of(source: Path, vae_config: str | None) -> tuple[Path, ModelsFile]:
    """Return the models of a models.yaml, a file or a folder, and the file or folder that they come from.

    A file or a folder with a VAE gives only this VAE, to be loaded at the start. vae_config: its `config`. Raises
    ConfigError.
    """
    if vae := vae_at(source):
        entry = ModelEntry(repo=str(vae), config=vae_config and absolute(vae_config), preload=True)
        return source, ModelsFile(models={"model": entry})
    if not source.is_dir():
        return source, parse_models(source)
    if (file := source / "models.yaml").is_file():
        return file, parse_models(file)
    raise ConfigError(
        f"{source} contains no config.json of a diffusers VAE, no vae/config.json, no safetensors file and no "
        "models.yaml; put one of them there"
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
    "shipped_models",
    "tls_context",
]
