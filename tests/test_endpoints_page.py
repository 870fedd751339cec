"""deploy/endpoints.md: what it tells to push runs, and every block runs as far as it does without the hub."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from server.config import ServerOptions
from server.web.routes import all_routes
from tests.conftest import REPOSITORY
from tests.inprocess.test_toolkit import STAND_IN, launched

PAGE = REPOSITORY / "deploy" / "endpoints.md"


def block(start: str) -> str:
    (found,) = re.findall(rf"^```\w+\n({re.escape(start)}.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page's upload sends."""
    sent: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", sent.update)
    monkeypatch.chdir(REPOSITORY)
    exec(block("from huggingface_hub import create_repo"), {})
    names = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*") if path.is_file()]
    patterns = {key: sent[key] for key in ("allow_patterns", "ignore_patterns")}
    for name in filter_repo_objects(names, **patterns):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def test_what_is_pushed_answers_what_is_asked(pushed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert not list(pushed.rglob("*.pyc"))
    assert {path.name for path in pushed.iterdir()} == {"handler.py", "models.yaml", "requirements.txt", "server"}
    place = tmp_path_factory.mktemp("client")
    with launched(STAND_IN, pushed, place / "log", VAE_SERVER_API_KEY="secret") as app:
        app.wait_until(200)
        variables = {**os.environ, "HF_TOKEN": "proxy", "VAE_KEY": "secret", "ENDPOINT": app.url}
        subprocess.run([sys.executable, "-c", block("import os")], cwd=place, env=variables, check=True, timeout=300)
    with Image.open(place / "decoded.jpg") as decoded:
        assert decoded.size == (512, 512)


def asked_to_make(start: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a block of the page asks huggingface_hub to create."""
    made: list[inspect.BoundArguments] = []
    signature = inspect.signature(huggingface_hub.create_inference_endpoint)
    record = lambda *args, **kwargs: made.append(signature.bind(*args, **kwargs))  # noqa: E731  # one line, for one test
    monkeypatch.setattr(huggingface_hub, "create_inference_endpoint", record)
    exec(block(start), {})
    (endpoint,) = made
    return endpoint.arguments


def test_the_endpoint_is_one_that_huggingface_hub_can_make(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = asked_to_make("from huggingface_hub import create_inference_endpoint", monkeypatch)
    assert all(name.startswith("VAE_SERVER_") for name in endpoint["env"])


def test_the_custom_container_is_asked_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    image = asked_to_make("import huggingface_hub", monkeypatch)["custom_image"]
    assert image["port"] == ServerOptions.model_fields["port"].default
    assert image["healthRoute"] in {route.path for route in all_routes(ServerOptions())}


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a clone")
def test_git_pushes_the_same(tmp_path: Path) -> None:
    remote, clone = tmp_path / "remote.git", tmp_path / "clone"
    for command in (["init", "-q", "--bare", remote], ["clone", "-q", REPOSITORY, clone]):
        subprocess.run(["git", *command], check=True)
    who = {f"GIT_{role}_{key}": "x@y.z" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    variables = {**os.environ, **who, "REPOSITORY": str(remote)}
    shell = ["bash", "-euo", "pipefail", "-c", block("git clone")]
    subprocess.run(shell, cwd=clone, env=variables, check=True, capture_output=True)
    listed = subprocess.run(["git", "-C", remote, "ls-tree", "--name-only", "HEAD"], capture_output=True, check=True)
    assert listed.stdout.split() == [b"handler.py", b"models.yaml", b"requirements.txt", b"server"]


def test_every_relative_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
