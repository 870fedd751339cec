"""Build the image and test it: `python -m deploy.image`. README.md beside this file says what is tested."""

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

# Files that may be in a working copy and must not get into the image.
STRAY = ("keys.txt", "server/.env", "server/vae.pt", "server/models/vae.safetensors", "server/__pycache__/old.pyc")


def stand_in(engine: Engine) -> None:
    """Make an image with Debian's Python 3.11 and the name of the base image, for machines without a registry.

    Needs root and debootstrap.
    """
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
    """Return the files of the working copy, except those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def write_context(folder: Path) -> None:
    """Copy the files of the working copy into a folder, and add the files of STRAY."""
    for name in (*tracked(), *STRAY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in STRAY:
            (folder / name).write_text("secret\n")
        else:
            shutil.copy2(REPOSITORY / name, folder / name)


def wanted() -> set[str]:
    """Return the files that the image must have in /app, except compiled Python."""
    alone = {"LICENSE", "constraints.txt", "handler.py", "models.yaml", "requirements.txt"}
    package = {name for name in tracked() if name.startswith("server/")}
    return alone | package - {"server/demo/train.py"}


def report_size(engine: Engine) -> None:
    """Print the size of each layer that is not empty, the newest first, and the size of the image."""
    lines = engine.run("history", "--no-trunc", "--format={{.Size}}\t{{.CreatedBy}}", IMAGE).splitlines()
    for size, command in (line.split("\t", 1) for line in lines):
        if not size.startswith("0"):
            click.echo(f"{size}\t{command.rpartition('/bin/sh -c ')[2][:80]}")
    total = int(engine.run("image", "inspect", "--format={{.Size}}", IMAGE))
    click.echo(f"{total / 1e6:.0f} MB\tin total")


@click.command()
@click.option("--stand-in", "is_stand_in", is_flag=True, help=f"first make {BASE_IMAGE} from Debian's Python")
@click.argument("build_flags", nargs=-1, metavar="[-- BUILD_FLAG...]")
def main(is_stand_in: bool, build_flags: tuple[str, ...]) -> None:
    """Build the image with podman or docker, print its size, run it, and test it.

    BUILD_FLAG: a flag of podman build or docker build, such as --build-arg DEVICE=cuda.
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
