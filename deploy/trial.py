"""Test the image in containers with the strictest flags."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import requests
from PIL import Image

from deploy.engine import IMAGE, Engine, Failed
from server.commands.local_files import read_latents

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "server/demo/latents/astronaut.safetensors"
SAMPLE_SIZE = (512, 512)
CONTRACT = (sys.executable, "-m", "tests.contract.__main__")

USER, PORT = "10001", 8000
# The folders that the image's user may write to: the volume, and those that Debian itself leaves open.
WRITABLE = ("/data", "/dev", "/proc", "/run/lock", "/sys", "/tmp", "/var/tmp")  # noqa: S108  # names, not files
START_S = 120  # the time in which the server must become healthy
STOP_S = 10  # the time after which `docker stop` kills a container


@dataclass(frozen=True)
class Trial:
    """The tests of the image.

    engine: the container program. files: the files that /app must contain, except compiled Python.
    """

    engine: Engine
    files: set[str]

    def run(self) -> None:
        """Run all checks. Raises Failed at the first one that fails."""
        self._check_files()
        self._check_shipped()
        self._check_mounted()

    @cached_property
    def _health(self) -> tuple[str, ...]:
        """The command of the image's HEALTHCHECK."""
        test = json.loads(self.engine.run("image", "inspect", "--format={{json .Config.Healthcheck.Test}}", IMAGE))
        return tuple(test[1:])

    def _check_files(self) -> None:
        inside = self._once("find", "/app", "-type", "f", "-not", "-name", "*.pyc").split()
        found = {path.removeprefix("/app/") for path in inside}
        check(found == self.files, f"/app contains the expected files and no others{sorted(found ^ self.files) or ''}")
        compiled = self._once("find", "/app", "-name", "*.pyc").split()
        check(len(compiled) > len(self.files) / 2, f"{len(compiled)} modules are compiled in the image")
        check(not any(path.endswith("old.pyc") for path in compiled), "no compiled module is from the working copy")
        writable = self._once("find", "/", "-xdev", "-writable", "-not", "-type", "l").split()
        check("/data" in writable, "the user may write to the volume")
        open_paths = [path for path in writable if not path.startswith(WRITABLE)]
        check(not open_paths, f"the user may write only under {', '.join(WRITABLE)}{open_paths or ''}")
        command, *arguments = self._health
        is_healthy = self.engine.succeeds("run", "--rm", f"--entrypoint={command}", IMAGE, *arguments)
        check(not is_healthy, "without a server, the health check fails")

    def _once(self, *command: str) -> str:
        """Run a command in a new container, and return what it prints.

        The root is writable, so that the modes of the files are tested. The exit status is ignored, because find fails
        for folders that it may not read.
        """
        script = '"$@" 2>/dev/null || true'
        return self.engine.run("run", "--rm", "--entrypoint=sh", IMAGE, "-c", script, "sh", *command)

    def _check_shipped(self) -> None:
        """Test the image's own CMD with the image's own models."""
        with self.engine.container(f"--publish=127.0.0.1::{PORT}") as name:
            self._wait_until_healthy(name)
            self._check_process(name)
            self._check_decode(self._url(name))
            self._check_end(name)

    def _check_mounted(self) -> None:
        """Test with models that are mounted in the folders that hosting platforms use."""
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*CONTRACT, "write", folder], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["chmod", "-R", "a+rX", folder], check=True)  # weights are readable only by their owner
            self._check_contract(folder)
            self._check_sagemaker(folder)

    def _check_contract(self, folder: str) -> None:
        """Run the contract suite against the image's own CMD, with models in /repository."""
        flags = (f"--volume={folder}:/repository:ro", f"--publish=127.0.0.1::{PORT}", "--env=HF_HUB_OFFLINE=1")
        with self.engine.container(*flags) as name:
            check(self._says_it_is_loading(name), "/health is 503 while the model is loaded")
            self._wait_until_healthy(name)
            ran = subprocess.run([*CONTRACT, "check", self._url(name), folder], cwd=REPOSITORY, check=False)
            check(ran.returncode == 0, "the models in /repository are found, and the contract suite passes")
            self._check_end(name)

    def _check_sagemaker(self, folder: str) -> None:
        """Test SageMaker's argument, folder, port and routes, with the variable that README.md says to set."""
        flags = (f"--volume={folder}/sd:/opt/ml/model:ro", "--publish=127.0.0.1::8080", "--env=VAE_SERVER_PORT=8080")
        with self.engine.container(*flags, command=("serve",)) as name:
            self._wait_until_healthy(name)
            url = self._url(name, 8080)
            check(requests.get(f"{url}ping", timeout=10).status_code == 200, "SageMaker's /ping is 200")
            latents = base64.b64encode(bytes(4 * 8 * 8 * 2)).decode()
            body = {"inputs": latents, "parameters": {"shape": [1, 4, 8, 8], "dtype": "float16"}}
            answer = requests.post(f"{url}invocations", json=body, timeout=60)
            check(answer.content.startswith(b"\xff\xd8"), "/opt/ml/model is found, and /invocations returns a JPEG")

    def _url(self, name: str, port: int = PORT) -> str:
        """Return the URL of a container's port on this machine."""
        return f"http://{self.engine.run('port', name, str(port)).splitlines()[0]}/"

    def _wait_until_healthy(self, name: str) -> int:
        """Wait for a successful health check, and return how many failed before it. Raises Failed after START_S."""
        began, failures = time.monotonic(), 0
        while not self.engine.succeeds("exec", name, *self._health):
            failures += 1
            if self._state(name)["Status"] != "running" or time.monotonic() - began > START_S:
                raise Failed(f"it did not become healthy:\n{self.engine.logs(name)}")
            time.sleep(0.2)
        check(True, f"healthy after {time.monotonic() - began:.1f} s; {failures} health checks failed until then")
        return failures

    def _says_it_is_loading(self, name: str) -> bool:
        """Return whether the first answer is a 503 that says that the server is loading."""
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            with suppress(requests.RequestException):
                answer = requests.get(f"{self._url(name)}health", timeout=10)
                return answer.status_code == 503 and "loading" in answer.json()["error"]
            time.sleep(0.05)
        return False

    def _state(self, name: str) -> dict[str, object]:
        """Return the state of a container."""
        state: dict[str, object] = json.loads(self.engine.run("inspect", "--format={{json .State}}", name))
        return state

    def _check_process(self, name: str) -> None:
        """Check the user, the capabilities and the writable folders of the server's process."""
        lines = self.engine.run("exec", name, "cat", "/proc/1/status").splitlines()
        status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        check(status["Name"] == ["python"], "the server is process 1")
        check(set(status["Uid"]) == {USER}, f"its user is {USER}")
        check(int(status["CapEff"][0], 16) == int(status["CapBnd"][0], 16) == 0, "it has no capabilities")
        for path, is_open in (("/data", True), ("/tmp", True), ("/app", False)):  # noqa: S108  # the container's
            wrote = self.engine.succeeds("exec", name, "touch", f"{path}/probe")
            check(wrote is is_open, f"{path} is {'writable' if is_open else 'not writable'}")

    def _check_decode(self, url: str) -> None:
        latents = read_latents(SAMPLE, None).tensor
        scaling_factor = json.loads((SAMPLE.parent.parent / "config.json").read_text())["scaling_factor"]
        parameters = {"shape": latents.shape, "dtype": latents.dtype, "scaling_factor": scaling_factor}
        headers = {"Content-Type": "tensor/binary", "Accept": "image/jpeg"}
        body = requests.post(url, params=parameters, data=bytes(latents.data), headers=headers, timeout=120).content
        image = Image.open(io.BytesIO(body))
        grey = image.convert("L").tobytes()
        found = f"{image.format} {image.size}, grey from {min(grey)} to {max(grey)}, {len(body)} bytes"
        is_right = (image.format, image.size) == ("JPEG", SAMPLE_SIZE) and max(grey) - min(grey) > 128
        check(is_right, f"{SAMPLE.name} is decoded to {found}")

    def _check_end(self, name: str) -> None:
        began = time.monotonic()
        self.engine.run("stop", f"--time={STOP_S}", name)
        seconds, status = time.monotonic() - began, self._state(name)["ExitCode"]
        check(status == 0 and seconds < STOP_S, f"SIGTERM ends the server in {seconds:.1f} s with status {status}")


def check(is_so: bool, sentence: str) -> None:
    """Print the sentence if it is true. Raises Failed otherwise."""
    if not is_so:
        raise Failed(f"this is not true: {sentence}")
    click.echo(f"ok: {sentence}")
