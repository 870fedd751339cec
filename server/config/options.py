"""The options of `serve`: flags, environment variables, defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import ConfigError
from .mistakes import DEVICES, ORIGINS, ROUTE, expected
from .paths import DECODE, HEALTH, RESERVED

USUAL_FPS = 10.0  # as the hosted endpoint for videos
SLOWEST_BYTES_PER_S = 64 << 10  # the rate at which a client must send or read, once its time of grace has passed
REFUSED_SHARE = 4  # beside max_connections, a fourth as many may be open only to be told that they are refused

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Route = Annotated[str, Field(pattern=ROUTE), AfterValidator(lambda path: path.rstrip("/") or "/")]
Origins = Annotated[str, Field(pattern=ORIGINS)]


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


def read_options(flags: Mapping[str, Any]) -> ServerOptions:
    """Return the options: flags over environment variables over defaults. Raises ConfigError."""
    try:
        options = ServerOptions(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        place = f"--{key.replace('_', '-')}" if key in flags else _variable_of(key)
        raise ConfigError(f"{place}: {expected(first)}, got {first['input']!r}") from None
    _check_routes(options)
    return options


def _check_routes(options: ServerOptions) -> None:
    """Raise ConfigError where one would take another route's place."""
    for name, own in (("health_route", HEALTH), ("predict_route", DECODE)):
        path = getattr(options, name) or "/"
        if path.split("/")[1] in RESERVED - {own_path.split("/")[1] for own_path in own}:
            raise ConfigError(f"{name}: {path} is another route of the server; choose a path of its own")


def _variable_of(key: str) -> str:
    """The environment variable that was read. key: a field's name, or the first of its aliases."""
    for field in ServerOptions.model_fields.values():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else ()
        if key in choices:
            return next(name for name in choices if isinstance(name, str) and name in os.environ)
    return f"VAE_SERVER_{key.upper()}"
