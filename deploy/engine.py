"""Run podman or docker by their command lines, which are the same for everything that is used here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

PROGRAMS = ("podman", "docker")
IMAGE = "vae-decode-server"

# The strictest flags for a container. The README recommends them.
CLOSED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


class Failed(click.ClickException):
    """A command or a check has failed."""


@dataclass(frozen=True)
class Engine:
    """A container program. program: podman or docker."""

    program: str

    def run(self, *arguments: str) -> str:
        """Run a command and return what it prints. Raises Failed."""
        ran = self._ran(*arguments, is_quiet=True)
        if ran.returncode:
            raise Failed(f"{self.program} {' '.join(arguments)}: exit {ran.returncode}\n{ran.stderr.strip()}")
        return ran.stdout.strip()

    def show(self, *arguments: str) -> None:
        """Run a command and show what it prints. Raises Failed."""
        if status := self._ran(*arguments, is_quiet=False).returncode:
            raise Failed(f"{self.program} {arguments[0]} exited with {status}")

    def succeeds(self, *arguments: str) -> bool:
        """Run a command and return whether it succeeded."""
        return self._ran(*arguments, is_quiet=True).returncode == 0

    def logs(self, name: str) -> str:
        """Return what a container has written to stdout and stderr."""
        ran = self._ran("logs", name, is_quiet=True)
        return ran.stdout + ran.stderr

    def _ran(self, *arguments: str, is_quiet: bool) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BUILDAH_FORMAT": "docker"}  # podman's other format has no HEALTHCHECK
        return subprocess.run(
            (self.program, *arguments), check=False, capture_output=is_quiet, text=True, env=environment
        )

    @contextmanager
    def container(self, *flags: str, command: tuple[str, ...] = ()) -> Iterator[str]:
        """Run a container of the image with the flags of CLOSED, and yield its id. Removes it at the end."""
        name = self.run("run", "--detach", *CLOSED, *flags, IMAGE, *command)
        try:
            yield name
        finally:
            self.run("rm", "--force", name)


def engine_at_hand() -> Engine:
    """Return the first container program that is installed. Raises Failed if there is none."""
    found = next(filter(shutil.which, PROGRAMS), None)
    if found is None:
        raise Failed("neither podman nor docker is installed; on Debian: apt-get install podman runc")
    return Engine(found)
