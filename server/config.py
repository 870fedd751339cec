"""models.yaml, VAE_SERVER_* and flags to one frozen Settings; a mistake is one ConfigError with file, line and key."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import ConfigError
from server.types import Limits

SHIPPED_MODELS_YAML = Path(__file__).resolve().parent.parent / "models.yaml"
MOUNTED = (Path("/repository"), Path("/opt/ml/model"))  # Inference Endpoints and SageMaker put a model there
ROUTE_WORDS = frozenset({"health", "metrics", "models", "predict", "encode", "openapi.json", "ping", "invocations"})
USUAL_FPS = 10.0  # of the hosted endpoint for videos
SLOWEST_BYTES_PER_S = 64 << 10  # a client below it, once its grace has passed, is cut off
REFUSED_SHARE = 4  # of max_connections: a fourth as many more may be open while they read that they are refused
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"

KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}:", re.ASCII)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Pixels = Annotated[int, Field(ge=64)]
DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)(,(cpu|cuda:\d+))*$"
ROUTE = r"^/[A-Za-z0-9._~:/-]*$"
ORIGIN = r"(null|[a-z][a-z0-9+.-]*://[^\s,/?#@]+)"
ORIGINS = rf"^(\*|{ORIGIN}(\s*,\s*{ORIGIN})*)$"
PATTERNS = {
    DEVICE: "auto, cpu, mps, cuda or cuda:N",
    DEVICES: "auto, cpu, mps, cuda or cuda:N, or several of cpu and cuda:N with commas",
    ROUTE: "a path that starts with /",
    ORIGINS: "origins as browsers send them, such as https://app.example, with commas between them, or *",
}
Route = Annotated[str, Field(pattern=ROUTE), AfterValidator(lambda path: path.rstrip("/") or "/")]
Origins = Annotated[str, Field(pattern=ORIGINS)]
KeyPath = tuple[str | int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LimitsEntry(_Strict):
    """The `limits` of a model."""

    max_pixels: int = Field(Limits.max_pixels, ge=64)
    max_frames: int = Field(Limits.max_frames, ge=1)
    max_batch: int = Field(Limits.max_batch, ge=1)


class ModelEntry(_Strict):
    """One entry under `models`."""

    repo: str = Field(min_length=1)
    subfolder: str | None = None
    revision: str | None = None
    family: str | None = None
    dtype: Dtype | None = None
    device: str | None = Field(None, pattern=DEVICE)
    decoder: Literal["auto", "diffusers", "plain"] = "auto"
    tiling: Literal["none", "diffusers"] = "none"
    fps: float | None = Field(None, gt=0, le=240)
    memory_budget_mb: int | None = Field(None, ge=1)
    preload: bool = False
    aliases: tuple[str, ...] = ()
    limits: LimitsEntry = LimitsEntry()
    warmup: tuple[tuple[Pixels, Pixels], ...] = ()

    @property
    def decodes_exactly(self) -> bool:
        """Whether an exact decoder may run it."""
        return self.decoder == "auto" and self.tiling == "none"

    def local_folder(self, base: Path) -> Path | None:
        """The folder that `repo` names, relative to models.yaml; None for a hub id.

        A hub id is `owner/name`; what starts with `.`, `/` or `~`, or exists beside models.yaml, is a folder.
        """
        folder = (base / os.path.expanduser(self.repo)).resolve()  # noqa: PTH111  # Path's raises for an unknown user
        return folder if self.repo.startswith((".", "/", "~")) or folder.is_dir() else None


class _ModelsFile(_Strict):
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
        return models


def check_name(word: str) -> None:
    """Raise ValueError unless `word` can be a model's name in a URL."""
    if not re.match(NAME_PATTERN, word):
        raise ValueError(f"'{word}' cannot be a model's name: use a-z, 0-9, '.', '_' and '-', at most 64")
    if word in ROUTE_WORDS:
        raise ValueError(f"'{word}' cannot be a model's name: it is a route of the server")


class ServerOptions(BaseSettings):
    """Every flag of `serve`; the environment variable is VAE_SERVER_ and the name in capitals. A flag wins.

    Where Vertex AI or SageMaker have a variable for the same thing, that is read last.
    """

    model_config = SettingsConfigDict(env_prefix="VAE_SERVER_", frozen=True, extra="ignore", populate_by_name=True)

    config: Path | None = Field(
        None,
        description="models.yaml, or a folder with one or with a VAE; default: /repository or /opt/ml/model if a model "
        "is mounted there, else the models.yaml in this folder, else the shipped one",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("VAE_SERVER_PORT", "AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
        description="port to listen on; 0 takes a free one",
    )
    health_route: Route | None = Field(
        None,
        validation_alias=AliasChoices("VAE_SERVER_HEALTH_ROUTE", "AIP_HEALTH_ROUTE"),
        description="one more path for GET /health",
    )
    predict_route: Route | None = Field(
        None,
        validation_alias=AliasChoices("VAE_SERVER_PREDICT_ROUTE", "AIP_PREDICT_ROUTE"),
        description="one more path for POST /",
    )
    device: str = Field(
        "auto",
        pattern=DEVICES,
        description="auto, cpu, cuda, cuda:N or mps, or several with commas, each with a worker process of its own; "
        "auto and cuda take every CUDA device",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of a worker's decode; default: the cores there are, shared by the CPU's workers",
    )
    dtype: Dtype = Field(
        "auto", description="auto, float32, float16 or bfloat16, for models whose entry names none; auto: by the device"
    )
    memory_budget_mb: int | None = Field(
        None, ge=1, description="most memory a decode's activations may take, in MiB; default: what is free"
    )
    model_memory_mb: int | None = Field(
        None, ge=1, description="most memory that a device's models may take, in MiB; the least recently used leave"
    )
    max_loaded: int | None = Field(
        None, ge=1, description="most decoders and encoders that a device holds; the least recently used leave"
    )
    idle_unload_s: float | None = Field(None, gt=0, description="unload a model that was not used for so long")
    max_queue: int = Field(
        16, ge=1, description="requests that wait or are computed at a time, for each device; one more is 429"
    )
    max_batch: int = Field(16, ge=1, description="requests decoded together at most")
    max_queue_mb: int = Field(
        1024, ge=1, description="bytes of accepted requests and their answers, in MiB; what comes over it is 429"
    )
    batch_pixels: int = Field(
        1 << 20, ge=1, description="pixels decoded together, of requests alike; larger ones are decoded alone"
    )
    max_body_mb: int = Field(128, ge=1, description="largest request body, in MiB")
    request_timeout_s: float = Field(300, gt=0, description="deadline of one request, in seconds; past it: 504")
    hang_timeout_s: float = Field(600, gt=0, description="a decode that takes so long has hung: its worker is ended")
    drain_timeout_s: float = Field(25, gt=0, description="after SIGTERM accepted requests have so long to finish")
    drain_notice_s: float = Field(
        0, ge=0, description="after SIGTERM new requests are answered 503 for at least so long"
    )
    jpeg_quality: int = Field(75, ge=1, le=100, description="JPEG quality unless the request says one")
    video_quality: float = Field(5, ge=1, le=10, description="MP4 quality unless the request says one; 5 is crf 25")
    fps: float | None = Field(
        None,
        gt=0,
        le=240,
        description="frames per second of every MP4 unless the request says them; "
        f"default: the fps of the model in models.yaml, else {USUAL_FPS:g}",
    )
    render_threads: int = Field(2, ge=1, description="threads that render JPEG, PNG and MP4")
    allowed_hosts: str | None = Field(
        None,
        description="Host names and addresses to answer for, with commas between them, or *; "
        "default: on a loopback address loopback names alone, else any",
    )
    cors_origins: Origins | None = Field(
        None,
        description="origins of web pages that may use the server, with commas between them, such as "
        "https://app.example:8443, or *; default: pages of the server itself",
    )
    head_timeout_s: float = Field(10, gt=0, description="most time for a request's line and headers, in seconds")
    body_timeout_s: float = Field(
        30, gt=0, description="most time for a request's body, in seconds, beside a second for each 64 KiB of it"
    )
    send_timeout_s: float = Field(
        30, gt=0, description="most time for a client to take its answer, in seconds, beside a second for each 64 KiB"
    )
    max_connections: int = Field(800, ge=1, description="open connections, idle ones too; one more is answered 503")
    log_format: Literal["text", "json"] = Field("text", description="log lines as text or as JSON objects")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    api_key_file: Path | None = Field(None, description="file of accepted keys, a line each: KEY, or NAME: KEY")
    api_key: SecretStr | None = Field(
        None, description="accepted keys, with commas between them; by environment only, for process lists show flags"
    )

    @property
    def first_device(self) -> str:
        """Where one process has all models."""
        return self.device.split(",")[0]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The name is for the log, which never holds the key."""

    name: str
    key: SecretStr


class Settings(_Strict):
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
    options = _options({key: value for key, value in flags.items() if value is not None})
    _check_routes(options)
    try:
        source, file = _models_of(_source(options.config))
    except OSError as error:
        reason = f"{error.strerror}; the user of this process must be able to read it"
        raise ConfigError(f"{error.filename or options.config}: {reason}") from None
    names = list(file.models)
    default = file.default or names[0]
    settings = Settings(
        options=options, source=source, default=default, models=file.models, api_keys=_api_keys(options)
    )
    known = settings.name_of(default)
    if known is None:
        raise ConfigError(
            f"{source}: default: no model '{default}'{_nearest(default, names)}; known: {', '.join(names)}"
        )
    if not only:
        return settings.model_copy(update={"default": known})
    kept = []
    for word in only:
        name = settings.name_of(word)
        if name is None:
            raise ConfigError(f"no model '{word}' in {source}{_nearest(word, names)}; known: {', '.join(names)}")
        kept.append(name)
    # Who names a model wants it ready, not at its first request.
    models = {name: file.models[name].model_copy(update={"preload": True}) for name in kept}
    return settings.model_copy(update={"default": kept[0], "models": models})


def forget_keys() -> None:
    """Take the keys, once they are read, out of the environment, so that no child process inherits them."""
    for name in [name for name in os.environ if name.upper() == "VAE_SERVER_API_KEY"]:
        del os.environ[name]


def _options(flags: Mapping[str, Any]) -> ServerOptions:
    try:
        return ServerOptions(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        place = f"--{key.replace('_', '-')}" if key in flags else _variable_of(key)
        raise ConfigError(f"{place}: {_expected(first)}, got {first['input']!r}") from None


def _check_routes(options: ServerOptions) -> None:
    """Raise ConfigError where one would take another route's place."""
    for name, own in (("health_route", {"health", "ping"}), ("predict_route", {"predict", "invocations"})):
        path = getattr(options, name) or "/"
        if path.split("/")[1] in ROUTE_WORDS - own:
            raise ConfigError(f"{name}: {path} is another route of the server; choose a path of its own")


def _variable_of(key: str) -> str:
    """The environment variable that was read. key: a field's name, or the first of its aliases."""
    for field in ServerOptions.model_fields.values():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else ()
        if key in choices:
            return next(name for name in choices if isinstance(name, str) and name in os.environ)
    return f"VAE_SERVER_{key.upper()}"


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


def _models_of(source: Path) -> tuple[Path, _ModelsFile]:
    """The file or folder that names them, and the models: of a folder with a VAE that one alone, to load at start."""
    if not source.is_dir():
        return source, _parse_models(source)
    for vae in (source, source / "vae"):
        if _is_vae(vae):
            return source, _ModelsFile(models={"model": ModelEntry(repo=str(vae), preload=True)})
    if (file := source / "models.yaml").is_file():
        return file, _parse_models(file)
    raise ConfigError(
        f"{source} has no config.json of a diffusers VAE, no vae/config.json and no models.yaml; put one of them there"
    )


def _api_keys(options: ServerOptions) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    if options.api_key is not None:
        keys += _named_keys(options.api_key.get_secret_value().split(","), "VAE_SERVER_API_KEY")
        if not keys:
            raise ConfigError("VAE_SERVER_API_KEY: is set and empty; unset it for a server without keys")
    if options.api_key_file:
        source = f"--api-key-file {options.api_key_file}"
        try:
            lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source}: is not text in UTF-8") from None
        found = _named_keys(lines, source)
        if not found:
            raise ConfigError(f"{source}: holds no key; put one on each line")
        keys += found
    return tuple(keys)


def _named_keys(entries: Sequence[str], source: str) -> list[ApiKey]:
    """`KEY` or `NAME: KEY`; the space tells a name from a key with a colon. Raises ConfigError, which shows no key."""
    keys = []
    for number, entry in enumerate(entries, 1):
        match entry.split():
            case []:
                continue
            case [key] if not KEY_NAME.fullmatch(key):
                keys.append(ApiKey(f"key-{number}", SecretStr(key)))
            case [name, key] if KEY_NAME.fullmatch(name):
                keys.append(ApiKey(name[:-1], SecretStr(key)))
            case _:
                raise ConfigError(f"{source}: entry {number}: expected KEY or NAME: KEY; a key has no spaces")
    return keys


def _parse_models(source: Path) -> _ModelsFile:
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
        raise ConfigError(f"{source}: an alias refers to what it stands in") from None
    try:
        return _ModelsFile.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(_sentence(error, source, lines)) from None
    except (TypeError, ValueError):
        raise ConfigError(f"{source}: a key is not a text; write dates and numbers that are names in quotes") from None


def _lines(node: yaml.Node | None, source: Path, path: KeyPath = ()) -> dict[KeyPath, int]:
    """The line of every key. Raises ConfigError for a key that stands twice."""
    lines = {path: node.start_mark.line + 1} if node else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, str(key.value))
            if place in lines:
                raise ConfigError(f"{source}:{key.start_mark.line + 1}: {_dotted(place)}: this key stands twice")
            lines |= _lines(value, source, place) | {place: key.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _lines(value, source, (*path, index))
    return lines


def _sentence(error: ValidationError, source: Path, lines: Mapping[KeyPath, int]) -> str:
    # A key that is misspelt is often the one that is missing.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = tuple(first["loc"])
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    where = f"{source}:{line}: {_dotted(place) or 'the file'}"
    if first["type"] == "extra_forbidden":
        known = list(_known_keys(place))
        return f"{where}: unknown key{_nearest(str(place[-1]), known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: this key is required"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: {_expected(first)}, got {first['input']!r}"


def _known_keys(place: KeyPath) -> Mapping[str, Any]:
    if len(place) == 1:
        return _ModelsFile.model_fields
    return LimitsEntry.model_fields if "limits" in place[2:-1] else ModelEntry.model_fields


def _expected(problem: Any) -> str:
    """pydantic's `Input should be a valid integer` as `expected a valid integer`."""
    if problem["type"] == "string_pattern_mismatch":
        return f"expected {PATTERNS[problem['ctx']['pattern']]}"
    message = str(problem["msg"])
    return "expected " + message.removeprefix("Input should be ") if message.startswith("Input") else message


def _dotted(place: KeyPath) -> str:
    return ".".join(map(str, place))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f", did you mean '{close[0]}'?" if close else ""
