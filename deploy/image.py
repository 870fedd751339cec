"""Build the image and try it: `python -m deploy.image`. README.md beside this file says what that proves."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import click

from deploy.engine import IMAGE, Engine, engine_at_hand
from deploy.trial import Trial

REPOSITORY = Path(__file__).resolve().parent.parent
BASE_IMAGE, SUITE = "docker.io/library/python:3.11-slim", "bookworm"
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
BASE_ENVIRONMENT = ("PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")

# What may lie in a working copy, and must not come into the image.
STRAY = ("keys.txt", "server/.env", "server/vae.pt", "server/models/vae.safetensors", "server/__pycache__/old.pyc")


def stand_in(engine: Engine) -> None:
    """Debian's own Python 3.11 under the base image's name, for where no registry answers. Needs root."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # /tmp may be in memory
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(root)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        for leavings in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / leavings)
            (root / leavings / "partial").mkdir(parents=True)
        subprocess.run(["tar", "--create", f"--file={archive}", f"--directory={root}", "."], check=True)
        changes = (f"--change=ENV {variable}" for variable in BASE_ENVIRONMENT)
        engine.run("import", *changes, str(archive), BASE_IMAGE)


def tracked() -> list[str]:
    """The working copy's files but those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def write_context(folder: Path) -> None:
    """The working copy, and what may lie around in one."""
    for name in (*tracked(), *STRAY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in STRAY:
            (folder / name).write_text("secret\n")
        else:
            shutil.copy2(REPOSITORY / name, folder / name)


def wanted() -> set[str]:
    """What the image's /app holds, beside compiled Python."""
    alone = {"LICENSE", "constraints.txt", "handler.py", "models.yaml", "requirements.txt"}
    package = {name for name in tracked() if name.startswith("server/")}
    return alone | package - {"server/demo/train.py"}


def report_size(engine: Engine) -> None:
    """Of each layer that has one, the newest first, and of the whole."""
    lines = engine.run("history", "--no-trunc", "--format={{.Size}}\t{{.CreatedBy}}", IMAGE).splitlines()
    for size, command in (line.split("\t", 1) for line in lines):
        if not size.startswith("0"):
            click.echo(f"{size}\t{command.rpartition('/bin/sh -c ')[2][:80]}")
    total = int(engine.run("image", "inspect", "--format={{.Size}}", IMAGE))
    click.echo(f"{total / 1e6:.0f} MB\tin all")


@click.command()
@click.option("--stand-in", "is_stand_in", is_flag=True, help=f"make {BASE_IMAGE} of Debian's own Python first")
@click.argument("build_flags", nargs=-1, metavar="[-- BUILD_FLAG...]")
def main(is_stand_in: bool, build_flags: tuple[str, ...]) -> None:
    """Build the image with podman or docker, say how large it is, run it, and see that it keeps its promises.

    BUILD_FLAG: of podman build or docker build, such as --build-arg DEVICE=cuda.
    """
    engine = engine_at_hand()
    if is_stand_in:
        stand_in(engine)
    with tempfile.TemporaryDirectory() as folder:
        write_context(Path(folder))
        engine.show("build", "--tag", IMAGE, *build_flags, folder)
    report_size(engine)
    Trial(engine, wanted()).run()


if __name__ == "__main__":
    main()
