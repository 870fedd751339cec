"""The commands of the program: serve, models, check, download, decode, encode, completion.

Only the commands that decode or encode in this process, or check, import torch.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import get_completion_class

from .. import COMMAND, __version__
from ..config import forget_keys, load_settings
from ..errors import ConfigError, ModelUnavailable, ServerError
from ..logs import write_logs
from .flags import Command, complete_model, complete_model_or_file, json_option, option, options
from .serving import bind, fit_connections, run_server
from .status_line import StatusLine

Function = TypeVar("Function", bound=Callable[..., Any])

PROGRAM = "vae-server"  # the installed script


class OneSentence(click.Group):
    """A group of commands that report every failure that a user can cause in one sentence, without a traceback."""

    command_class = Command

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
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again when it exits
            fail(f"the output cannot be written: {error.strerror}", 1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order in which a user needs them."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what to do first."""
        with formatter.section("Examples"):
            for example in ("serve", "decode latents.safetensors picture.png", "serve --help"):
                formatter.write(f"{'':{formatter.current_indent}}{ctx.find_root().info_name} {example}\n")


def fail(sentence: str, status: int) -> NoReturn:
    """Print an error and exit with this status."""
    click.echo(f"error: {sentence}", err=True)
    sys.exit(status)


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """A self-hosted VAE server for diffusers' remote_decode and remote_encode."""


def models_argument(name: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the argument for any number of models or files of models."""
    return click.argument(name, nargs=-1, metavar="[MODEL]...", shell_complete=complete_model_or_file)


@main.command(
    examples=(
        "serve",
        "serve flux --port 8001",
        "serve ./sdxl_vae.safetensors --vae-config sdxl",
        "serve --host 0.0.0.0 --api-key-file keys.txt",
    )
)
@models_argument("models")
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


@main.command(examples=("models", "models flux", "models ltx --kind video", "models --json"))
@click.argument("name", required=False, shell_complete=complete_model)
@option(
    "--kind",
    type=click.Choice(["image", "video", "audio", "preview"]),
    group="Choice",
    help="list only models of this kind",
)
@option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "markdown"]),
    default="text",
    group="Output",
    help="format of the list",
)
@json_option
@options("config")
def models(name: str | None, kind: str | None, form: str, as_json: bool, config: str | None) -> None:
    """List the models of models.yaml, or show one.

    The table has their latents, weights and licences; * marks the default model. NAME is the name or an alias of one
    model, to show everything about it, or a part of names, to list those models.
    """
    from ..listing import chosen, families_table, listed
    from .model_table import describe_all, details, table

    settings = load_settings(config=config)
    one = settings.name_of(name) if name and kind is None else None
    infos = describe_all(settings, [one] if one else None)
    names = [one] if one else chosen(settings, infos, kind, name)
    if form == "json" or as_json:
        click.echo(json.dumps([listed(settings, each, infos.get(each)) for each in names], indent=1))
    elif form == "markdown":
        click.echo(families_table(settings, {each: infos[each] for each in names if each in infos}), nl=False)
    elif not names:
        fail(f"no model of models.yaml matches; run `{COMMAND} models` for all of them", 1)
    elif one:
        click.echo(details(settings, one, infos.get(one)))
    else:
        click.echo(table(settings, names, infos))


@main.command(examples=("check", "check flux", "check ./sdxl_vae.safetensors --vae-config sdxl"))
@models_argument("names")
@json_option
@options("config", "vae_config", "device", "allow_custom_decoders")
def check(names: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Check the configuration, and decode once.

    Every problem with the configuration, the device, the weights and the codecs is named, with what to do. Each model
    whose weights are on this machine decodes once.
    """
    settings = load_settings(names, **flags)
    findings = []
    with StatusLine() as line, line.doing("checking"):
        from .checks import check_all

        for finding in check_all(settings):
            findings.append(finding)
            if not as_json:
                line.clear()
                click.echo(str(finding))
    if as_json:
        told = [{"is_problem": finding.is_problem, "text": finding.text} for finding in findings]
        click.echo(json.dumps(told, indent=1))
    if problems := sum(finding.is_problem for finding in findings):
        fail(f"{problems} problem{'s' if problems > 1 else ''} found", 1)


@main.command(examples=("download flux", "download"))
@models_argument("names")
@options("config")
def download(names: tuple[str, ...], config: str | None) -> None:
    """Download weights, with a progress bar.

    Those of all models of models.yaml are downloaded, or only those of the named models.
    """
    from ..engine.weights.config_json import components
    from ..engine.weights.hub import source_of

    settings, missed = load_settings(names, config=config), 0
    for name in settings.models:
        source = source_of(settings, name)
        try:
            for part in components(source):
                click.echo(f"{name}: {(folder := part.files().folder)}")
                if part is source and (commit := source.commit_of(folder)) and not source.entry.revision:
                    click.echo(f"   to pin this version, add to models.yaml: revision: {commit}")
        except ModelUnavailable as error:
            click.echo(f"error: {error.detail}", err=True)
            missed += 1
    if missed:
        sys.exit(1)


def where_options(verb: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the options for the place of the work. verb: decode or encode."""
    group = "Where"

    def add(function: Function) -> Function:
        function = option(
            "--no-server", "is_here", is_flag=True, group=group, help=f"{verb} in this process, even if a server runs"
        )(function)
        return option(
            "--server",
            metavar="URL",
            group=group,
            help=f"{verb} at this server; default: one that runs on port 8000 (VAE_SERVER_PORT) of this machine and "
            "has the model (HTTP or HTTPS, without an API key), unless --config, --vae-config, --device or "
            "--allow-custom-decoders is given",
        )(function)

    return add


model_option = option(
    "--model",
    shell_complete=complete_model,
    group="Latents",
    help="name or alias of the model; default: the default model",
)


@main.command(
    examples=(
        "decode latents.safetensors picture.png",
        "decode latents.safetensors picture.jpg --model flux --height 1024 --width 1024",
        "decode latents.safetensors video.mp4 --model wan --server http://gpu-box:8000",
    )
)
@click.argument("latents", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@model_option
@option("--key", group="Latents", help="name of the tensor in the file; default: 'latents', or the only tensor")
@option(
    "--scaled/--unscaled",
    default=True,
    group="Latents",
    help="whether the latents are scaled, as pipelines return them (default), or unscaled, as vae.decode takes them",
)
@option("--height", type=int, group="Latents", help="height of the image in pixels, for packed latents")
@option("--width", type=int, group="Latents", help="width of the image in pixels, for packed latents")
@option("--num-frames", type=int, group="Latents", help="number of frames, for CogVideoX 1.5 and packed video latents")
@option("--seed", type=int, group="Latents", help="seed of the noise of a diffusion decoder; default: 0")
@option("--decode-steps", type=int, group="Latents", help="number of denoising steps of a diffusion decoder")
@option("--quality", type=float, group="Output", help="quality: JPEG 1 to 100, MP4 1 to 10")
@option("--fps", type=float, group="Output", help="frames per second of an MP4; default: those of the model")
@json_option
@where_options("decode")
@options("config", "vae_config", "device", "allow_custom_decoders")
def decode(
    latents: Path,
    out: Path,
    server: str | None,
    is_here: bool,
    key: str | None,
    scaled: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Decode latents to an image, a video or audio.

    LATENTS (a .safetensors or .latent file) is decoded to OUT (a .png, .jpg, .mp4, .wav or .flac file).
    """
    from . import coding
    from .local_files import output_of, read_latents

    flags = {name: given.pop(name) for name in ("config", "vae_config", "device", "allow_custom_decoders")}
    accept, output_type = output_of(out)
    found = read_latents(latents, key)
    tensor = found.tensor
    parameters = {
        **{name: value for name, value in given.items() if value is not None},
        "do_scaling": scaled,
        "output_type": output_type,
    }
    is_with_sound = found.has_sound and key is None and output_type == "mp4"
    if is_with_sound or found.is_from_comfyui:
        # The whole file, for a video with its sound, or for latents that are scaled as in ComfyUI.
        data = latents.read_bytes()
    else:
        data = bytes(tensor.data)
        parameters |= {"shape": list(tensor.shape), "dtype": tensor.dtype}
    where = coding.Where(server, is_here, given["model"], flags)
    with StatusLine() as line:
        coded = coding.decode(where, parameters, data, accept, line)
    coding.report(out, coded, as_json=as_json)


@main.command(
    examples=(
        "encode picture.png latents.safetensors",
        "encode video.mp4 latents.safetensors --model wan --server http://gpu-box:8000",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@model_option
@option(
    "--scaled/--unscaled",
    default=True,
    group="Latents",
    help="whether to scale the latents, as pipelines take them (default), or not, as vae.encode returns them",
)
@option("--seed", type=int, group="Latents", help="return a sample of the posterior with this seed; default: its mode")
@json_option
@where_options("encode")
@options("config", "vae_config", "device")
def encode(
    file: Path,
    out: Path,
    server: str | None,
    is_here: bool,
    seed: int | None,
    scaled: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Encode an image or a video to latents.

    FILE (a .png, .jpg, .webp or .mp4 file) is encoded to latents in OUT (a .safetensors file).
    """
    from . import coding
    from .local_files import check_latents_suffix, read

    flags = {name: given.pop(name) for name in ("config", "vae_config", "device")}
    check_latents_suffix(out)
    parameters = {"do_scaling": scaled, **given, **({} if seed is None else {"sample": True, "seed": seed})}
    data = read(file)
    where = coding.Where(server, is_here, given["model"], flags)
    with StatusLine() as line:
        coded = coding.encode(where, parameters, data, line)
    coding.report(out, coded, as_json=as_json)


@main.command(
    examples=(
        "completion bash >> ~/.bashrc",
        "completion zsh >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/vae-server.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script for completion in a shell.

    With it, the shell completes the commands, options, models and files of vae-server.
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, PROGRAM, f"_{PROGRAM.replace('-', '_').upper()}_COMPLETE").source())
