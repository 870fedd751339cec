"""`python -m server download` with huggingface_hub's own client, against a hub on this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.commands.terminal import on_terminal
from tests.commands.test_cli import assert_one_sentence, invoke, run
from tests.conftest import write_models_yaml
from tests.hub import COMMIT, Hub, running_hub
from tests.vaes import LocalVae

Vaes = dict[str, LocalVae]


@pytest.fixture(scope="module")
def hub(vaes: Vaes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Hub]]:
    root = tmp_path_factory.mktemp("hub") / "owner"
    shutil.copytree(vaes["flux"].folder, root / "full" / "vae")
    (root / "full" / "README.md").write_text("not wanted")
    (root / "full" / "vae" / "big.safetensors").write_text("not wanted")
    shutil.copytree(vaes["sd"].folder, root / "pickled")
    (root / "pickled" / "diffusion_pytorch_model.safetensors").rename(root / "pickled" / "diffusion_pytorch_model.bin")
    with running_hub(root.parent) as running:
        yield running


def download(
    hub: tuple[str, Hub], home: Path, models: dict[str, Any], command: str = "download", online: bool = True
) -> Any:
    config = write_models_yaml(home / "models.yaml", models, next(iter(models)))
    return run(
        command, "--config", config, HF_ENDPOINT=hub[0], HF_HOME=str(home), HF_HUB_OFFLINE="0" if online else "1",
        HF_HUB_DISABLE_XET="1",
    )  # fmt: skip


def test_a_download_takes_what_is_needed_and_works_offline_afterwards(hub: tuple[str, Hub], tmp_path: Path) -> None:
    hub[1].asked.clear()
    models = {"m": {"repo": "owner/full", "subfolder": "vae", "family": "flux"}}
    ran = download(hub, tmp_path, models)
    assert ran.returncode == 0, ran.stderr
    said, advice = ran.stdout.splitlines()
    assert advice == f"   to pin this version, add to models.yaml: revision: {COMMIT}"
    folder = Path(said.removeprefix("m: "))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert folder.parent.name == COMMIT
    assert ran.stderr == "", "a progress bar is for a terminal"
    assert not any("big.safetensors" in asked for asked in hub[1].asked)
    hub[1].asked.clear()
    ran = download(hub, tmp_path, models, "check", online=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'m' decodes" in ran.stdout
    assert hub[1].asked == []


def test_a_download_on_a_terminal_has_a_progress_bar(hub: tuple[str, Hub], tmp_path: Path) -> None:
    models = {"m": {"repo": "owner/full", "subfolder": "vae", "family": "flux"}}
    config = write_models_yaml(tmp_path / "models.yaml", models, "m")
    environment = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    ran = on_terminal("download", "--config", config, **environment)
    assert ran.returncode == 0, ran.shown
    assert re.search(r"\d+%\|", ran.shown)


def test_one_file_of_a_repository_is_downloaded_without_its_neighbours(hub: tuple[str, Hub], tmp_path: Path) -> None:
    """Also without the config.json beside it, which may belong to another file."""
    hub[1].asked.clear()
    config = tmp_path / "config.json"
    config.write_text((Path(hub[1].root) / "owner" / "full" / "vae" / "config.json").read_text())
    file = "diffusion_pytorch_model.safetensors"
    models = {"m": {"repo": "owner/full", "subfolder": "vae", "file": file, "config": str(config)}}
    ran = download(hub, tmp_path, models)
    assert ran.returncode == 0, ran.stderr
    folder = Path(ran.stdout.splitlines()[0].removeprefix("m: "))
    assert [path.name for path in folder.iterdir()] == [file]
    ran = download(hub, tmp_path, models, "check", online=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'m' decodes" in ran.stdout


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"repo": "owner/gated"}, "the repository is gated: accept its licence at .*, then set HF_TOKEN"),
    "nothing": ({"repo": "owner/nothing"}, "the hub has no such repository, or it is private"),
    "pickled": ({"repo": "owner/pickled"}, "only pickle weights .*bin. .* a pickle file can run code"),
    "misspelt": ({"repo": "owner/full", "subfolder": "vea"}, "has no vea/config.json; check subfolder"),
    "lost": ({"repo": "owner/full", "file": "x.safetensors", "config": "sd"}, "has no x.safetensors; check file"),
    "old": ({"repo": "owner/full", "subfolder": "vae", "revision": "v9"}, "no revision 'v9'; check revision"),
}


def test_each_download_that_cannot_be_is_one_sentence(hub: tuple[str, Hub], tmp_path: Path) -> None:
    ran = download(hub, tmp_path, {name: entry for name, (entry, _) in REFUSED.items()})
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(REFUSED)
    for name, (entry, words) in REFUSED.items():
        assert re.search(f"^error: {name} .{entry['repo']}.*: .*{words}", "\n".join(errors), re.MULTILINE), name


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where its client need not wait before it asks again."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    config = write_models_yaml(tmp_path / "models.yaml", {"m": {"repo": "owner/full"}}, "m")
    assert_one_sentence(
        invoke("download", "--config", config), "m .owner/full.: .*the hub cannot be reached; check the network", 1
    )
