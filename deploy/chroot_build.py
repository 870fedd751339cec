"""Build and try the image without docker: the Dockerfile's instructions, carried out in a folder made by debootstrap.

Debian bookworm's Python 3.11 stands in for python:3.11-slim. README.md beside this file says what that
proves and what not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import click

from deploy.dockerfile import (
    Arg,
    Cmd,
    Copy,
    DockerfileError,
    Env,
    Expose,
    From,
    Healthcheck,
    Ignored,
    Instruction,
    Run,
    User,
    Volume,
    Workdir,
    expand,
    parse,
)
from deploy.image import Image
from deploy.trial import Failed, Trial, free_port

CONTEXT = Path(__file__).resolve().parent.parent
BASE_IMAGE, SUITE = "python:3.11-slim", "bookworm"
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


@dataclass(frozen=True)
class Builder:
    """Carries instructions out.

    given: build arguments. machine: variables of this machine that RUN sees. binds: folders of it that RUN sees.
    mirror: of Debian, None for that of this machine's apt.
    """

    image: Image
    given: Mapping[str, str]
    machine: Mapping[str, str]
    binds: tuple[Path, ...]
    mirror: str | None

    def carry_out(self, instruction: Instruction) -> None:
        """Raises Failed, DockerfileError."""
        image = self.image
        variables = {**image.arguments, **image.environment}
        match instruction:
            case From(name):
                if name != BASE_IMAGE:
                    raise Failed(f"FROM {name}: what debootstrap makes here stands in for {BASE_IMAGE} alone")
                debootstrap(image.root, self.mirror or debian_mirror())
            case Arg(name, default):
                image.arguments[name] = self.given.get(name, expand(default, variables))
            case Env(values):
                image.environment |= {name: expand(value, variables) for name, value in values.items()}
            case Run(script):
                self._run(script)
            case Copy(sources, target):
                for source in sources:
                    copy(CONTEXT / source, image.inside(target), is_into=target.endswith("/"))
            case Workdir(path):
                image.workdir = path
                image.inside(path).mkdir(parents=True, exist_ok=True)
            case User():
                image.user = instruction
            case Volume(path):
                image.volume = path
                image.inside(path).mkdir(parents=True, exist_ok=True)
            case Expose():
                pass
            case Healthcheck():
                image.health = instruction
            case Cmd(argv):
                image.command = argv

    def _run(self, script: str) -> None:
        extra = {**self.image.arguments, **self.image.environment, **self.machine}
        with mount_points(self.image.root, self.binds):
            ran = subprocess.run(self.image.entering(("/bin/sh", "-c", script), extra, binds=self.binds), check=False)
        if ran.returncode:
            raise Failed(f"RUN exited with {ran.returncode}: {script}")


def debootstrap(root: Path, mirror: str) -> None:
    """A minimal Debian with `python` and `pip`, and no more of a package manager's leavings than the base image has."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(root), mirror],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    for leavings in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / leavings)
        (root / leavings / "partial").mkdir(parents=True)


def debian_mirror() -> str:
    """The first source of this machine's apt that has the suite."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for text in (file.read_text() for file in files if file.is_file()):
        for paragraph in text.split("\n\n"):
            keys = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != "#")
            if SUITE in keys.get("Suites", "").split():
                return keys["URIs"].split()[0]
        for words in (line.split() for line in text.splitlines() if line.startswith("deb ")):
            if SUITE in words:
                return words[words.index(SUITE) - 1]
    raise Failed(f"no source of {SUITE} in /etc/apt: give --mirror URL")


def copy(source: Path, target: Path, *, is_into: bool) -> None:
    """As COPY does: a folder's content, a file; nothing that .dockerignore covers; modes kept, owner root."""
    ignored = Ignored((CONTEXT / ".dockerignore").read_text())
    files = [file for file in sorted([source, *source.rglob("*")]) if file.is_file()]
    kept = [file for file in files if not ignored.covers(PurePosixPath(file.relative_to(CONTEXT)))]
    if not kept:
        raise Failed(f"COPY {source.relative_to(CONTEXT)}: not there, or .dockerignore covers it")
    for file in kept:
        if source.is_dir():
            destination = target / file.relative_to(source)
        else:
            destination = target / source.name if is_into else target
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, destination)


@contextmanager
def mount_points(root: Path, binds: Sequence[Path]) -> Iterator[None]:
    """Folders to mount `binds` on while a command runs; those that were not there are gone afterwards."""
    made: list[Path] = []
    for bind in binds:
        target = root / str(bind).lstrip("/")
        missing = [folder for folder in (target, *target.parents) if not folder.exists()]
        made += missing
        target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in sorted(made, reverse=True):
            folder.rmdir()


def size_bytes(folder: Path) -> int:
    """Of the files under it, each hard link once."""
    states = [path.lstat() for path in folder.rglob("*") if not path.is_symlink() and path.is_file()]
    return sum({(state.st_dev, state.st_ino): state.st_size for state in states}.values())


def report_parts(image: Image) -> None:
    folders = [folder for folder in image.root.glob("usr/local/lib/python3*/*-packages/*") if folder.is_dir()]
    largest = sorted(((size_bytes(folder), folder.name) for folder in folders), reverse=True)[:8]
    click.echo("largest packages: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for size, name in largest))
    click.echo(f"the server's own files: {size_bytes(image.inside('.')) / 1e6:.1f} MB")


def build(builder: Builder, instructions: Sequence[Instruction]) -> None:
    """Says what each instruction took and added, as `docker history` would."""
    root, before = builder.image.root, 0
    for instruction in instructions:
        began = time.monotonic()
        builder.carry_out(instruction)
        if isinstance(instruction, From | Run | Copy):
            size = size_bytes(root)
            took = time.monotonic() - began
            click.echo(f"{(size - before) / 1e6:8.1f} MB  {took:6.1f} s  {' '.join(str(instruction).split())[:90]}")
            before = size
    click.echo(f"{before / 1e6:8.1f} MB  in all")
    report_parts(builder.image)


def pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE; NAME alone takes this machine's value."""
    found = {}
    for name, equals, value in (word.partition("=") for word in values):
        if not equals and name not in os.environ:
            raise click.BadParameter(f"{name} has no value here: write {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


@click.command()
@click.option("--root", type=click.Path(path_type=Path), help="folder to make the image in; default: a temporary one")
@click.option("--build-arg", metavar="NAME=VALUE", multiple=True, callback=pairs, help="as for docker build")
@click.option("--env", metavar="NAME[=VALUE]", multiple=True, callback=pairs, help="a variable for RUN, not kept")
@click.option(
    "--bind",
    "binds",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="a folder that RUN sees",
)
@click.option("--mirror", metavar="URL", help="of Debian; default: that of this machine's apt")
@click.option("--keep", is_flag=True, help="leave the root there")
def main(
    root: Path | None,
    build_arg: dict[str, str],
    env: dict[str, str],
    binds: tuple[Path, ...],
    mirror: str | None,
    keep: bool,
) -> None:
    """Carry the Dockerfile out in a chroot and try the result. Needs root, debootstrap and mount namespaces.

    --bind and --env show RUN a folder and a variable of this machine, where its pip is configured by them.
    """
    if os.geteuid() != 0:
        raise Failed("chroot and mount need root")
    instructions = parse((CONTEXT / "Dockerfile").read_text())
    declared = {instruction.name for instruction in instructions if isinstance(instruction, Arg)}
    if unknown := build_arg.keys() - declared:
        raise Failed(f"no ARG {', '.join(unknown)} in the Dockerfile; known: {', '.join(sorted(declared))}")
    folder = root or Path(tempfile.mkdtemp(prefix="image-", dir="/var/tmp"))  # made fresh, for root alone
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Failed(f"{folder} is not empty")
    folder.chmod(0o755)
    image = Image(folder.resolve())
    try:
        build(Builder(image, build_arg, env, tuple(bind.absolute() for bind in binds), mirror), instructions)
        Trial(image, free_port()).run()
    except (DockerfileError, subprocess.SubprocessError, OSError) as error:
        raise Failed(str(error)) from error
    finally:
        if not keep:
            subprocess.run(["rm", "-r", "--one-file-system", "--", str(folder)], check=True)


if __name__ == "__main__":
    main()
