"""Run a finished image as a container would run, and see that it keeps its promises."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image as Picture

from deploy.image import Image
from server.files import read_latents

CONTEXT = Path(__file__).resolve().parent.parent
SAMPLE = CONTEXT / "server/demo/latents/astronaut.safetensors"
SAMPLE_SIZE = (512, 512)

# What a container's user may write: the tmpfs, the volume, and what Debian itself leaves open.
WRITABLE = ("/data", "/dev", "/proc", "/run/lock", "/sys", "/tmp", "/var/tmp")  # noqa: S108  # names, not files
STOP_S = 10  # what `docker stop` grants


class Failed(click.ClickException):
    """A step or a check that did not come out as it must."""


@dataclass(frozen=True)
class Trial:
    """One container of a finished image: its user, its root read-only, its /tmp a tmpfs."""

    image: Image
    port: int

    def run(self) -> None:
        """Raises Failed at the first promise that is not kept."""
        self._check_files()
        check(not self._is_healthy(), "the health check fails before the server runs")
        began = time.monotonic()
        server = subprocess.Popen(self._entering(self.image.command))
        try:
            polls = self._wait_until_healthy(server)
            check(True, f"healthy after {time.monotonic() - began:.1f} s; {polls} health checks failed until then")
            (process,) = children(server)
            self._check_process(process)
            self._check_decode()
            began = time.monotonic()
            os.kill(process, signal.SIGTERM)
            try:
                status = server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"SIGTERM did not end it within {STOP_S} s") from None
            check(status == 0, f"SIGTERM ends it: {time.monotonic() - began:.1f} s, exit {status}")
        finally:
            for process in children(server):
                os.kill(process, signal.SIGKILL)  # and with process 1, all of its namespace
            server.wait()
        check(not self._is_healthy(), "the health check fails after the server stopped")

    def _entering(self, argv: Sequence[str]) -> list[str]:
        return self.image.entering(argv, {"VAE_SERVER_PORT": str(self.port)}, is_read_only=True)

    def _succeeds(self, argv: Sequence[str]) -> bool:
        ran = subprocess.run(self._entering(argv), check=False, stderr=subprocess.DEVNULL, timeout=60)
        return ran.returncode == 0

    def _is_healthy(self) -> bool:
        if self.image.health is None:
            raise Failed("no HEALTHCHECK")
        return self._succeeds(self.image.health.argv)

    def _wait_until_healthy(self, server: subprocess.Popen[bytes]) -> int:
        """How many health checks failed before one succeeded."""
        health = self.image.health
        deadline = time.monotonic() + (health.start_period_s if health else 0)
        failures = 0
        while not self._is_healthy():
            failures += 1
            if server.poll() is not None:
                raise Failed(f"the server ended with {server.returncode} before it was healthy")
            if time.monotonic() > deadline:
                raise Failed("the server was not healthy within the health check's start period")
            time.sleep(0.2)
        return failures

    def _check_files(self) -> None:
        """On a writable root, so that it is the modes that are tested."""
        find = ("find", "/", "-xdev", "-writable", "-not", "-type", "l")
        found = subprocess.run(self.image.entering(find, {}), check=False, capture_output=True, text=True).stdout
        check("/data" in found.split(), "the volume is the user's")
        open_paths = [path for path in found.splitlines() if not path.startswith(WRITABLE)]
        check(not open_paths, f"the user may write nowhere but under {', '.join(WRITABLE)}{open_paths or ''}")
        check(self._succeeds(("touch", f"{self.image.volume}/probe")), f"{self.image.volume} is writable")
        (self.image.inside(self.image.volume) / "probe").unlink()
        check(self._succeeds(("touch", "/tmp/probe")), "/tmp is writable")  # noqa: S108  # the container's
        check(not self._succeeds(("touch", f"{self.image.workdir}/probe")), f"{self.image.workdir} is not")

    def _check_process(self, process: int) -> None:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        uids, capabilities = set(status["Uid"]), int(status["CapEff"][0], 16)
        check(uids == {str(self.image.user.uid)} and uids != {"0"}, f"the process's user is {', '.join(uids)}")
        check(capabilities == 0, "it has no capabilities")
        check(status["NSpid"][-1] == "1", "it is process 1 of its container")

    def _check_decode(self) -> None:
        latents = read_latents(SAMPLE, None)
        scaling_factor = json.loads((SAMPLE.parent.parent / "config.json").read_text())["scaling_factor"]
        parameters = {"shape": latents.shape, "dtype": latents.dtype, "scaling_factor": scaling_factor}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/?{urllib.parse.urlencode(parameters, doseq=True)}",
            data=bytes(latents.data),
            headers={"Content-Type": "tensor/binary", "Accept": "image/jpeg"},
        )
        began = time.monotonic()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
            body = response.read()
        picture = Picture.open(io.BytesIO(body))
        grey = picture.convert("L").tobytes()
        darkest, brightest = min(grey), max(grey)
        seconds = time.monotonic() - began
        found = (
            f"{picture.format} {picture.size}, grey from {darkest} to {brightest}, {len(body)} bytes, {seconds:.1f} s"
        )
        is_right = (picture.format, picture.size) == ("JPEG", SAMPLE_SIZE) and brightest - darkest > 128
        check(is_right, f"{SAMPLE.name} comes back as {found}")


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """`unshare` has one, the container's process 1, while that runs."""
    if process.poll() is not None:
        return []
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check(is_so: bool, sentence: str) -> None:
    if not is_so:
        raise Failed(f"not so: {sentence}")
    click.echo(f"ok: {sentence}")
