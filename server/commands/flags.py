"""The options of the commands: made from the options of `serve`, shown in groups, and followed by examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ..config import ServerOptions, load_settings
from ..errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])

OTHERS = "Other options"
MODELS_AND_DEVICE = "Models and device"
GROUPS = {
    MODELS_AND_DEVICE: ("config", "vae_config", "device", "dtype", "threads", "allow_custom_decoders"),
    "Address": ("host", "port", "advertise", "health_route", "predict_route"),
    "Access": ("tls_cert", "tls_key", "api_key_file", "allowed_hosts", "cors_origins"),
    "Memory": ("memory_budget_mb", "model_memory_mb", "max_loaded", "idle_unload_s"),
    "Queue, batches and jobs": (
        *("max_queue", "max_queue_mb", "max_batch", "batch_pixels"),
        *("max_jobs", "job_ttl_s", "job_results_mb"),
    ),
    "Answers": ("jpeg_quality", "video_quality", "fps", "render_threads"),
    "Time limits of the work": ("request_timeout_s", "hang_timeout_s", "drain_timeout_s", "drain_notice_s"),
    "Limits of a connection": (
        *("max_body_mb", "max_connections"),
        *("head_timeout_s", "body_timeout_s", "send_timeout_s"),
    ),
    "Logs": ("log_level", "log_format"),
}
"""The options of `serve` by the headings under which `--help` shows them."""


class Flag(click.Option):
    """An option with the heading under which `--help` shows it."""

    def __init__(self, *names: Any, group: str = OTHERS, **settings: Any) -> None:
        """Make an option. names, settings: as for click.Option."""
        super().__init__(*names, **settings)
        self.group = group


class Command(click.Command):
    """A command whose help shows its options in groups, and then examples."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        """Make a command. examples: what may follow the name of the program. arguments, settings: as for click."""
        super().__init__(*arguments, **settings)
        self._examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group. The last one has `--help`, which belongs to none."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", OTHERS), []).append(record)
        for heading, records in sorted(groups.items(), key=lambda group: group[0] == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        program = ctx.find_root().info_name
        with formatter.section("Examples"):
            for example in self._examples:
                formatter.write(f"{'':{formatter.current_indent}}{program} {example}\n")


def option(*names: str, group: str, **settings: Any) -> Callable[[Function], Function]:
    """Return a decorator that adds an option. group: the heading under which `--help` shows it."""
    return click.option(*names, cls=Flag, group=group, **settings)


def options(*names: str) -> Callable[[Function], Function]:
    """Return a decorator that adds options of `serve` to a command.

    The flags are made from the fields of ServerOptions, so that each is described only once. pydantic checks values.

    names: the options to add; all except `api_key` if none is given.
    """
    headings = {name: heading for heading, members in GROUPS.items() for name in members}
    fields = ServerOptions.model_fields
    ordered = names or [*headings, *(name for name in fields if name not in headings and name != "api_key")]

    def add(function: Function) -> Function:
        for name in reversed(ordered):
            field = fields[name]
            default = "" if field.default is None else f"  [default: {field.default}]"
            text = f"{field.description}{default}  [env: VAE_SERVER_{name.upper()}]"
            kind: dict[str, Any] = (
                {"flag_value": True, "default": None} if field.annotation is bool else {"metavar": name.upper()}
            )
            if name == "config":
                kind["type"] = click.Path()  # a shell completes the names of files
            flag = option(f"--{name.replace('_', '-')}", name, group=headings.get(name, OTHERS), help=text, **kind)
            function = flag(function)
        return function

    return add


json_option = option("--json", "as_json", is_flag=True, group="Output", help="print JSON, for scripts")


def complete_model(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of models that begin with what was typed, for the completion of a shell."""
    with suppress(ConfigError):
        models = load_settings(config=ctx.params.get("config")).models
        names = [word for name, entry in models.items() for word in (name, *entry.aliases)]
        return [CompletionItem(name) for name in names if name.startswith(incomplete.lower())]
    return []


def complete_model_or_file(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of models, and let the shell add files."""
    return [*complete_model(ctx, parameter, incomplete), CompletionItem(incomplete, type="file")]
