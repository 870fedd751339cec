"""podman or docker by their command lines, which agree as far as they are used here."""

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

# As far as a container can be closed; the README tells to run it so.
CLOSED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


class Failed(click.ClickException):
    """A step or a check that did not come out as it must."""


@dataclass(frozen=True)
class Engine:
    """program: podman or docker."""

    program: str

    def run(self, *arguments: str) -> str:
        """What the command prints. Raises Failed."""
        ran = self._ran(*arguments, is_quiet=True)
        if ran.returncode:
            raise Failed(f"{self.program} {' '.join(arguments)}: exit {ran.returncode}\n{ran.stderr.strip()}")
        return ran.stdout.strip()

    def show(self, *arguments: str) -> None:
        """Let the reader see what it prints. Raises Failed."""
        if status := self._ran(*arguments, is_quiet=False).returncode:
            raise Failed(f"{self.program} {arguments[0]} exited with {status}")

    def succeeds(self, *arguments: str) -> bool:
        return self._ran(*arguments, is_quiet=True).returncode == 0

    def logs(self, name: str) -> str:
        """Both streams of a container."""
        ran = self._ran("logs", name, is_quiet=True)
        return ran.stdout + ran.stderr

    def _ran(self, *arguments: str, is_quiet: bool) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BUILDAH_FORMAT": "docker"}  # podman's other format has no HEALTHCHECK
        return subprocess.run(
            (self.program, *arguments), check=False, capture_output=is_quiet, text=True, env=environment
        )

    @contextmanager
    def container(self, *flags: str, command: tuple[str, ...] = ()) -> Iterator[str]:
        """A closed one that runs meanwhile. Yields its id."""
        name = self.run("run", "--detach", *CLOSED, *flags, IMAGE, *command)
        try:
            yield name
        finally:
            self.run("rm", "--force", name)


def engine_at_hand() -> Engine:
    """Raises Failed."""
    found = next(filter(shutil.which, PROGRAMS), None)
    if found is None:
        raise Failed("there is neither podman nor docker; on Debian: apt-get install podman runc")
    return Engine(found)
