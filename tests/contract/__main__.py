"""The contract as cases: what a client may send, against a local decode or encode of the same weights.

For any server, wherever it runs, of the small VAEs that `python -m tests.contract write FOLDER` makes; then
`python -m tests.contract check URL FOLDER` is the client, and `python -m tests.contract serve` does both to a server of
its own. The cases are the tests of this server's own clients.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click

from tests.load import process
from tests.vaes import LocalVae, build_all, read_all, write_entries
from tests.web import test_first_client, test_remote_decode, test_remote_encode, test_whole_files


class Case(NamedTuple):
    """run: called with the server's address, which ends in a slash, and the VAEs; raises where they disagree."""

    name: str
    run: Callable[[str, dict[str, LocalVae]], None]


def cases_of(module: ModuleType) -> Iterator[Case]:
    """Its tests that need no more than a server and the VAEs, each with every one of its parameters."""
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        choices = [parameters(mark) for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for chosen in product(*choices):
            given = {key: value for pairs in chosen for key, value in pairs.items()}
            if set(inspect.signature(test).parameters) == {"url", "vaes", *given}:
                values = ", ".join(map(str, given.values()))
                yield Case(
                    f"{name.removeprefix('test_')}[{values}]" if given else name.removeprefix("test_"),
                    partial(test, **given),
                )


def parameters(mark: Any) -> list[dict[str, Any]]:
    """One `parametrize` as keyword arguments."""
    names, values = mark.args
    keys = names.split(",") if isinstance(names, str) else names
    return [dict(zip(keys, value if len(keys) > 1 else (value,), strict=True)) for value in values]


MODULES = (test_remote_decode, test_remote_encode, test_first_client, test_whole_files)
CASES = [case for module in MODULES for case in cases_of(module)]


@click.group()
def main() -> None:
    """The contract's cases."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def write(folder: Path) -> None:
    """Make the small VAEs in FOLDER, and a models.yaml to serve them by."""
    folder.mkdir(parents=True, exist_ok=True)
    build_all(folder)
    click.echo(write_entries(folder))


@main.command()
@click.pass_context
def serve(context: click.Context) -> None:
    """Put `python -m server serve` on this machine to every case."""
    with tempfile.TemporaryDirectory() as folder:
        context.invoke(write, folder=Path(folder))
        with process(Path(folder) / "models.yaml") as (url, _):
            context.invoke(check, url=url, folder=Path(folder))


@main.command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def check(url: str, folder: Path) -> None:
    """Put the server at URL to every case."""
    vaes, failed = read_all(folder), 0
    for case in CASES:
        try:
            case.run(url.rstrip("/") + "/", vaes)
        except Exception as error:  # noqa: BLE001  # the next cases run all the same
            failed += 1
            click.echo(f"FAILED  {case.name}: {type(error).__name__}: {error}")
    click.echo(f"{len(CASES) - failed} of {len(CASES)} cases passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
