"""A real ComfyUI in a process of its own, with the nodes of this repository, and its HTTP API."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S, until

FOLDER = os.environ.get("COMFYUI", "")
SMALL_WAN = Path(__file__).with_name("small_wan")

Flow = dict[str, dict[str, Any]]
"""A workflow in the form of the API: by the number of each node, its class and its inputs."""


class Failed(Exception):
    """A workflow that ended with an error, with the text that ComfyUI shows."""


def interpreter() -> str:
    """The Python of ComfyUI: COMFYUI_PYTHON, or that of an environment in its folder, or the one of the tests."""
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [Path(FOLDER) / name / "bin" / "python" for name in (".venv", "venv")]
    return named or next((str(path) for path in inside if path.exists()), sys.executable)


@dataclass(frozen=True)
class Program:
    """A running ComfyUI. folder: its base folder, with its inputs and outputs."""

    url: str
    folder: Path

    def start(self, flow: Flow, client: str = "") -> str:
        """Start a workflow and return its number."""
        sent = requests.post(self.url + "prompt", json={"prompt": flow, "client_id": client or uuid.uuid4().hex})
        assert sent.ok, sent.text
        return str(sent.json()["prompt_id"])

    def history(self, number: str) -> dict[str, Any] | None:
        """What is known of a workflow that has ended; None before."""
        found = requests.get(f"{self.url}history/{number}", timeout=PATIENCE_S).json().get(number)
        return dict(found) if found and found["status"]["status_str"] else None

    def wait(self, number: str) -> dict[str, Any]:
        """The history of a workflow, once it has ended."""
        until(lambda: self.history(number) is not None, "the end of the workflow", 0.1)
        found = self.history(number)
        assert found
        return found

    def run(self, flow: Flow) -> dict[str, list[dict[str, str]]]:
        """The files that each node of a workflow saved. Raises Failed."""
        told = self.wait(self.start(flow))
        for name, about in told["status"]["messages"]:
            if name == "execution_error":
                raise Failed(about["exception_message"])
        assert told["status"]["status_str"] == "success", told["status"]
        return {
            number: [file for files in made.values() for file in files if isinstance(file, dict)]
            for number, made in told["outputs"].items()
        }

    def path(self, file: dict[str, str]) -> Path:
        """The path of a saved file."""
        return self.folder / file["type"] / file["subfolder"] / file["filename"]

    def pictures(self, files: list[dict[str, str]]) -> Any:
        """Saved images, `[B, H, W, 3]`, as /view gives them."""
        answers = [requests.get(self.url + "view", params=file, timeout=PATIENCE_S).content for file in files]
        return np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")).astype(int) for each in answers])

    def latents(self, files: list[dict[str, str]]) -> Any:
        """Saved latents."""
        (file,) = files
        return load_file(self.path(file))["latent_tensor"]


@contextmanager
def program(folder: Path, environment: Mapping[str, str]) -> Iterator[Program]:
    """Start ComfyUI with an own base folder."""
    for name in ("custom_nodes", "input", "output", "user", "temp", "models/vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "custom_nodes" / "remote_vae").symlink_to(REPOSITORY / "clients" / "comfyui")
    (folder / "custom_nodes" / "small_wan").symlink_to(SMALL_WAN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [interpreter(), "main.py", "--cpu", "--base-directory", str(folder), "--port", str(port)]
    log = (folder / "log.txt").open("w+")
    given = {**os.environ, **environment, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    comfyui = subprocess.Popen(command, cwd=FOLDER, env=given, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/"

    def answers() -> bool:
        assert comfyui.poll() is None, (folder / "log.txt").read_text()[-4000:]
        try:
            return requests.get(url + "system_stats", timeout=5).ok
        except requests.RequestException:
            return False

    try:
        until(answers, "the start of ComfyUI", 0.2)
        yield Program(url, folder)
    finally:
        comfyui.terminate()
        comfyui.wait(PATIENCE_S)
        log.close()
