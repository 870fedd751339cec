"""The options of `serve`, which are read from flags and environment variables."""

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

USUAL_FPS = 10.0  # the same as the hosted endpoint for videos
SLOWEST_BYTES_PER_S = 64 << 10  # the rate at which a client must send or read after its grace period
REFUSED_SHARE = 4  # a quarter of max_connections more may be open for a moment, to get a refusal

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Route = Annotated[str, Field(pattern=ROUTE), AfterValidator(lambda path: path.rstrip("/") or "/")]
Origins = Annotated[str, Field(pattern=ORIGINS)]


class ServerOptions(BaseSettings):
    """The options of `serve`.

    Each is a flag, and an environment variable whose name is VAE_SERVER_ and the name of the option in capitals. The
    flag takes precedence. If Vertex AI or SageMaker have a variable for the same purpose, it is read last.
    """

    model_config = SettingsConfigDict(env_prefix="VAE_SERVER_", frozen=True, extra="ignore", populate_by_name=True)

    config: Path | None = Field(
        None,
        description="a models.yaml, a file of a VAE, or a folder that contains one or the other; default: "
        "/repository or /opt/ml/model if a model is mounted there, else models.yaml in the current folder, else the "
        "one that comes with the server",
    )
    vae_config: str | None = Field(
        None,
        min_length=1,
        description="configuration of the VAE file, folder or repository that is given by its path or name: the name "
        "of a model that comes with the server, such as sd or sdxl, or the path of a config.json",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("VAE_SERVER_PORT", "AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
        description="port to listen on; 0 for any free port",
    )
    advertise: bool = Field(
        False,
        description="tell the local network the server's address by multicast DNS, so that clients find it; "
        "needs the package zeroconf",
    )
    health_route: Route | None = Field(
        None,
        validation_alias=AliasChoices("VAE_SERVER_HEALTH_ROUTE", "AIP_HEALTH_ROUTE"),
        description="additional path for GET /health",
    )
    predict_route: Route | None = Field(
        None,
        validation_alias=AliasChoices("VAE_SERVER_PREDICT_ROUTE", "AIP_PREDICT_ROUTE"),
        description="additional path for POST /",
    )
    device: str = Field(
        "auto",
        pattern=DEVICES,
        description="auto, cpu, cuda, cuda:N or mps, or several separated by commas; each device gets its own worker "
        "process; auto and cuda use every CUDA device",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each worker; default: all cores, divided among the workers on the CPU",
    )
    dtype: Dtype = Field(
        "auto",
        description="auto, float32, float16 or bfloat16, for models whose entry sets no dtype; auto depends on the "
        "device",
    )
    memory_budget_mb: int | None = Field(
        None,
        ge=1,
        description="maximum memory for activations, in MiB; default: the memory that is free",
    )
    model_memory_mb: int | None = Field(
        None,
        ge=1,
        description="maximum memory for the models of a device, in MiB; the least recently used are unloaded; "
        "default: no limit",
    )
    max_loaded: int | None = Field(
        None,
        ge=1,
        description="maximum number of decoders and encoders on a device; the least recently used are unloaded; "
        "default: no limit",
    )
    idle_unload_s: float | None = Field(
        None, gt=0, description="unload a model that has not been used for so many seconds; default: never"
    )
    max_queue: int = Field(
        16, ge=1, description="maximum number of waiting and running requests per device; beyond it: 429"
    )
    max_batch: int = Field(16, ge=1, description="maximum number of requests in a batch")
    max_queue_mb: int = Field(
        1024,
        ge=1,
        description="maximum memory for the bytes of accepted requests and their answers, in MiB; beyond it: 429",
    )
    max_jobs: int = Field(
        64,
        ge=1,
        description="maximum number of jobs (`Prefer: respond-async`); a new one takes the place of a finished one "
        "that was fetched, or that nobody fetched for 60 s; otherwise: 429",
    )
    job_ttl_s: float = Field(600, gt=0, description="how long the answer of a job is kept, in seconds")
    job_results_mb: int = Field(
        512, ge=1, description="maximum memory for the answers of jobs, in MiB; the oldest are dropped first"
    )
    batch_pixels: int = Field(
        1 << 20,
        ge=1,
        description="maximum number of pixels in a batch of several requests; a larger request gets its own batch",
    )
    max_body_mb: int = Field(128, ge=1, description="maximum size of a request's body, in MiB")
    request_timeout_s: float = Field(300, gt=0, description="deadline of a request, in seconds; after it: 504")
    hang_timeout_s: float = Field(
        600, gt=0, description="restart a worker whose work makes no progress for so many seconds"
    )
    drain_timeout_s: float = Field(
        25, gt=0, description="after SIGTERM, wait at most so many seconds for the accepted requests"
    )
    drain_notice_s: float = Field(
        0, ge=0, description="after SIGTERM, answer new requests with 503 for at least so many seconds"
    )
    jpeg_quality: int = Field(75, ge=1, le=100, description="JPEG quality, if the request does not set it")
    video_quality: float = Field(5, ge=1, le=10, description="MP4 quality, if the request does not set it; 5 is crf 25")
    fps: float | None = Field(
        None,
        gt=0,
        le=240,
        description="frames per second of every MP4, if the request does not set them; "
        f"default: the fps of the model in models.yaml, else {USUAL_FPS:g}",
    )
    render_threads: int | None = Field(
        None,
        ge=1,
        description="threads of each worker that render images, and as many that render videos; "
        "default: half of the worker's share of the cores, 2 to 8",
    )
    tls_cert: Path | None = Field(
        None, description="certificate chain in a PEM file; the server then speaks HTTPS and no HTTP"
    )
    tls_key: Path | None = Field(
        None, description="private key of --tls-cert in a PEM file; default: it is in the file of the certificate"
    )
    allowed_hosts: str | None = Field(
        None,
        description="accepted Host names and addresses, separated by commas, or *; "
        "default: only loopback names if the server listens on a loopback address, else any",
    )
    cors_origins: Origins | None = Field(
        None,
        description="origins of web pages that may use the server, separated by commas, such as "
        "https://app.example:8443, or *; default: only the server's own page",
    )
    head_timeout_s: float = Field(
        10, gt=0, description="maximum time to receive a request's line and headers, in seconds"
    )
    body_timeout_s: float = Field(
        30, gt=0, description="maximum time to receive a body, in seconds, plus one second per 64 KiB"
    )
    send_timeout_s: float = Field(
        30, gt=0, description="maximum time for a client to read its answer, in seconds, plus one second per 64 KiB"
    )
    max_connections: int = Field(
        800, ge=1, description="maximum number of open connections, including idle ones; beyond it: 503"
    )
    allow_custom_decoders: bool = Field(
        False,
        description="run the classes of installed packages that decoder: package.module:Class in models.yaml names",
    )
    log_format: Literal["text", "json"] = Field("text", description="log lines as text or as JSON objects")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level of log lines: debug, info, warning or error"
    )
    api_key_file: Path | None = Field(None, description="file of accepted API keys, one per line: KEY, or NAME: KEY")
    api_key: SecretStr | None = Field(
        None,
        description="accepted API keys, separated by commas; not a flag, because process lists show flags",
    )

    @property
    def first_device(self) -> str:
        """The first device, which runs all models if there is only one process."""
        return self.device.split(",")[0]


def read_options(flags: Mapping[str, Any]) -> ServerOptions:
    """Read the options. Flags take precedence over environment variables, and these over defaults.

    flags: options by name. Raises ConfigError.
    """
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
    """Raise ConfigError if an additional route would replace another route of the server."""
    for name, own in (("health_route", HEALTH), ("predict_route", DECODE)):
        path = getattr(options, name) or "/"
        if path.split("/")[1] in RESERVED - {own_path.split("/")[1] for own_path in own}:
            raise ConfigError(f"{name}: {path} is another route of the server; choose another path")


def _variable_of(key: str) -> str:
    """Return the environment variable that was read. key: the name of a field, or one of its aliases."""
    for field in ServerOptions.model_fields.values():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else ()
        if key in choices:
            return next(name for name in choices if isinstance(name, str) and name in os.environ)
    return f"VAE_SERVER_{key.upper()}"
