"""The commands of `python -m server`: serve, models, check, download, decode, encode.

Only the commands that decode or encode in this process, or look at weights, import torch.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from .. import __version__
from ..config import REFUSED_SHARE, ServerOptions, Settings, forget_keys, load_settings
from ..errors import ConfigError, ModelUnavailable, ServerError
from ..logs import write_logs

if TYPE_CHECKING:
    import requests

    from ..inprocess.direct import Direct

log = logging.getLogger(__name__)

# The open files of the front process in addition to its connections: its own files, the connections to its workers, and
# the files that ffmpeg reads.
OTHER_FILES = 40

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*names: str) -> Callable[[Command], Command]:
    """Return a decorator that adds options of `serve` to a command.

    The flags are made from the fields of ServerOptions, so that each is described only once. pydantic checks values.

    names: the options to add; all except `api_key` if none is given.
    """

    def add(command: Command) -> Command:
        for name in reversed(names or [name for name in ServerOptions.model_fields if name != "api_key"]):
            field = ServerOptions.model_fields[name]
            default = "" if field.default is None else f"  [default: {field.default}]"
            text = f"{field.description}{default}  [env: VAE_SERVER_{name.upper()}]"
            kind: dict[str, Any] = (
                {"flag_value": True, "default": None} if field.annotation is bool else {"metavar": name.upper()}
            )
            command = click.option(f"--{name.replace('_', '-')}", name, help=text, **kind)(command)
        return command

    return add


class OneSentence(click.Group):
    """A group of commands that report every failure that a user can cause in one sentence, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Exits with status 2 for a mistake in the configuration, 1 for other errors."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            fail(str(error), 2)
        except ModelUnavailable as error:
            fail(error.detail, 1)
        except ServerError as error:
            fail(error.told(to_operator=True), 1)


def fail(sentence: str, status: int) -> NoReturn:
    """Print an error and exit with this status."""
    click.echo(f"error: {sentence}", err=True)
    sys.exit(status)


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """A self-hosted VAE server for diffusers' remote_decode and remote_encode."""


@main.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@options()
def serve(models: tuple[str, ...], **flags: Any) -> None:
    """Serve all models of models.yaml, or only the named ones. The first named model answers at /.

    MODEL is a name of models.yaml, the path of a .safetensors file or of a folder, or owner/name on the Hub.
    """
    # Signals end the process from the beginning, also as process 1 of a container. Later uvicorn handles them.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that stays so
            signal.signal(ending, lambda *_: sys.exit(0))
    settings = load_settings(models, **flags)
    forget_keys()
    listener = bind(settings.options.host, settings.options.port)
    write_logs(settings.options.log_level, settings.options.log_format)
    run_server(fit_connections(settings), listener)


def fit_connections(settings: Settings) -> Settings:
    """Raise this process's limit of open files as far as `max_connections` needs it.

    If the limit cannot be raised so far, return settings with a lower `max_connections`, and log a warning. Without
    that, waiting connections would be closed without an answer when the limit is reached. Connections that are refused
    are also open for a moment, see `REFUSED_SHARE`.
    """
    options = settings.options
    needed = OTHER_FILES + options.max_connections + options.max_connections // REFUSED_SHARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return settings
    fitting = max(1, (soft - OTHER_FILES) * REFUSED_SHARE // (REFUSED_SHARE + 1))
    log.warning(
        "max_connections is %d instead of %d, because this process may have only %d open files; raise the limit "
        "(ulimit -n, LimitNOFILE=, --ulimit nofile=)",
        fitting,
        options.max_connections,
        soft,
    )
    return settings.model_copy(update={"options": options.model_copy(update={"max_connections": fitting})})


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket, to be made before anything slow, so that early clients wait instead of failing.

    Raises ConfigError if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from None
    return listener


def run_server(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal arrives.

    Raises ModelUnavailable or ConfigError if a model or a device that is needed at the start cannot be used.
    """
    from .. import ffmpeg
    from ..metrics import Metrics
    from ..scheduling.dispatcher import Dispatcher
    from ..scheduling.service import Service, State
    from ..web.app import create_app
    from ..web.drain import DrainingServer
    from ..workers.devices import engines_for
    from ..workers.process import start_forkserver

    start_forkserver()
    with suppress(RuntimeError):  # images need no ffmpeg, and `check` reports that there is none
        ffmpeg.executable()
    metrics = Metrics()
    dispatcher = Dispatcher(engines_for(settings, metrics), settings.options)
    service = Service(settings, dispatcher, metrics)

    def on_started() -> None:
        if service.state is State.FAILED:
            server.should_exit = True
        elif service.state is State.READY:
            announce(settings, listener)

    app = create_app(service, on_started)
    server = DrainingServer(service, app)
    try:
        server.run(sockets=[listener])
    finally:
        dispatcher.kill()  # after a second signal, the engines have no time to end by themselves
    if service.failure:
        raise service.failure


def announce(settings: Settings, listener: socket.socket) -> None:
    """Print the address to use in a client, and a warning if everyone may use it."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    others = [name for name in settings.models if name != settings.default]
    click.echo(f"ready: {url} decodes with '{settings.default}'", err=True)
    if others:
        click.echo(f"       {url}NAME decodes with {', '.join(others)}", err=True)
    if not settings.api_keys and host not in ("127.0.0.1", "::1"):
        click.echo(
            "       every client that can reach this address may use it; to require keys, set --api-key-file", err=True
        )


@main.command()
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", help="format of the list"
)
@click.option("--kind", type=click.Choice(["image", "video", "audio", "preview"]), help="list only models of this kind")
@click.argument("part", required=False, metavar="[PART-OF-A-NAME]")
@options("config")
def models(form: str, kind: str | None, part: str | None, config: str | None) -> None:
    """List the models of models.yaml: latents, statistics, limits, licences, weights.

    With a part of a name, list only models whose name or alias contains it.
    """
    from ..listing import as_text, chosen, families_table, listed
    from .checks import describe_all

    settings = load_settings(config=config)
    infos = describe_all(settings)
    names = chosen(settings, infos, kind, part)
    if form == "markdown":
        click.echo(families_table(settings, {name: infos[name] for name in names if name in infos}), nl=False)
    elif form == "json":
        click.echo(json.dumps([listed(settings, name, infos.get(name)) for name in names], indent=1))
    elif not names:
        fail("no model of models.yaml matches; run `python -m server models` for all of them", 1)
    for name in names if form == "text" else ():
        click.echo(as_text(settings, name, infos.get(name)))


@main.command()
@click.argument("names", nargs=-1, metavar="[MODEL]...")
@options("config", "vae_config", "device", "allow_custom_decoders")
def check(names: tuple[str, ...], **flags: Any) -> None:
    """Check the configuration, the device, the weights and the codecs, and decode once with each downloaded model."""
    from .checks import check_all

    problems = 0
    for finding in check_all(load_settings(names, **flags)):
        problems += finding.is_problem
        click.echo(str(finding))
    if problems:
        fail(f"{problems} problem{'s' if problems > 1 else ''} found", 1)


@main.command()
@click.argument("names", nargs=-1, metavar="[MODEL]...")
@options("config")
def download(names: tuple[str, ...], config: str | None) -> None:
    """Download the weights of all models of models.yaml, or only of the named ones, with a progress bar."""
    from ..engine.weights.config_json import read_info
    from ..engine.weights.hub import source_of
    from ..families import FAMILIES

    settings, missed = load_settings(names, config=config), 0
    for name in settings.models:
        source = source_of(settings, name)
        try:
            companion = FAMILIES[read_info(source).latents.family].companion
            click.echo(f"{name}: {(folder := source.files().folder)}")
            if (commit := source.commit_of(folder)) and not source.entry.revision:
                click.echo(f"   to pin this version, add to models.yaml: revision: {commit}")
            if companion:
                click.echo(f"{name}: {source.beside(companion).files().folder}")
        except ModelUnavailable as error:
            click.echo(f"error: {error.detail}", err=True)
            missed += 1
    if missed:
        sys.exit(1)


@main.command()
@click.argument("latents", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--server", metavar="URL", help="decode on this server; default: decode in this process")
@click.option("--model", help="name or alias of the model; default: the default model")
@click.option("--key", help="name of the tensor in the file; default: 'latents', or the only tensor")
@click.option("--height", type=int, help="height of the image in pixels, for packed latents")
@click.option("--width", type=int, help="width of the image in pixels, for packed latents")
@click.option("--num-frames", type=int, help="number of frames, for CogVideoX 1.5 and packed video latents")
@click.option("--seed", type=int, help="seed of the noise of a diffusion decoder; default: 0")
@click.option("--decode-steps", type=int, help="number of denoising steps of a diffusion decoder")
@click.option(
    "--scaled/--unscaled",
    default=True,
    help="whether the latents are scaled, as pipelines return them (default), or unscaled, as vae.decode takes them",
)
@click.option("--quality", type=float, help="quality: JPEG 1 to 100, MP4 1 to 10")
@options("config", "vae_config", "device", "fps", "allow_custom_decoders")
def decode(latents: Path, out: Path, server: str | None, key: str | None, scaled: bool, **given: Any) -> None:
    """Decode LATENTS (a .safetensors or .latent file) to OUT (a .png, .jpg or .mp4 file)."""
    from .local_files import output_of, read_latents

    flags = {name: given.pop(name) for name in ("config", "vae_config", "device", "allow_custom_decoders")}
    found = read_latents(latents, key)
    tensor = found.tensor
    accept, output_type = output_of(out)
    parameters = {
        **{name: value for name, value in given.items() if value is not None},
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "do_scaling": scaled and not found.is_unscaled,
        "output_type": output_type,
    }
    data = bytes(tensor.data)
    if server:
        body = _ask(server, parameters, data, {"Content-Type": "tensor/binary", "Accept": accept}).content
    else:
        direct, name = _direct(load_settings(**flags), given["model"])
        request = direct.parse(name, parameters, data, accept)
        body = bytes(direct.render(request, direct.run(request)).body)
    _write(out, body)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--server", metavar="URL", help="encode on this server; default: encode in this process")
@click.option("--model", help="name or alias of the model; default: the default model")
@click.option("--seed", type=int, help="return a sample of the posterior with this seed; default: its mode")
@click.option(
    "--scaled/--unscaled",
    default=True,
    help="whether to scale the latents, as pipelines take them (default), or not, as vae.encode returns them",
)
@options("config", "vae_config", "device")
def encode(file: Path, out: Path, server: str | None, seed: int | None, scaled: bool, **given: Any) -> None:
    """Encode FILE (a .png, .jpg, .webp or .mp4 file) to latents in OUT (a .safetensors file)."""
    from ..model_info import Direction
    from ..outputs.tensor import as_safetensors
    from ..values import RawTensor

    flags = {name: given.pop(name) for name in ("config", "vae_config", "device")}
    parameters = {"do_scaling": scaled, **given, **({} if seed is None else {"sample": True, "seed": seed})}
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    if server:
        answer = _ask(server.rstrip("/") + "/encode", parameters, data, {})
        shape, dtype = tuple(json.loads(answer.headers["shape"])), answer.headers["dtype"]
        latents = RawTensor(shape, dtype, memoryview(answer.content))
    else:
        direct, name = _direct(load_settings(**flags), given["model"])
        latents = direct.run(direct.parse(name, parameters, data, "*/*", Direction.ENCODE)).body
    _write(out, as_safetensors(latents))


def _write(out: Path, body: bytes) -> None:
    """Write a file and print its size. Raises ConfigError."""
    try:
        out.write_bytes(body)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}") from None
    click.echo(f"{out}: {len(body)} bytes")


def _ask(server: str, parameters: dict[str, Any], data: bytes, headers: dict[str, str]) -> requests.Response:
    """Send a request to a server, and return its answer. Raises ConfigError if it fails."""
    import requests

    try:
        response = requests.post(server, params=parameters, data=data, headers=headers, timeout=(10, None))
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema):
        raise ConfigError(f"{server}: not a URL; write http://{server}") from None
    except requests.RequestException as error:
        raise ConfigError(f"{server}: no answer ({type(error).__name__}); is the server running?") from None
    if not response.ok:
        try:
            sentence = response.json()["error"]
        except (json.JSONDecodeError, KeyError, TypeError):
            sentence = f"it answered with status {response.status_code}; is this a VAE decode server?"
        raise ConfigError(f"{server}: {sentence}")
    return response


def _direct(settings: Settings, model: str | None) -> tuple[Direct, str]:
    """Return what runs requests in this process, and the name of the model. Raises ConfigError for an unknown one."""
    from ..inprocess.direct import Direct

    name = settings.name_of(model) if model else settings.default
    if name is None:
        raise ConfigError(f"there is no model '{model}' in {settings.source}; known: {', '.join(settings.models)}")
    return Direct(settings), name
