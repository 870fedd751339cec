"""Every block of README and docs is run: shell and Python against a real `make serve`, YAML through the loader."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.utils.remote_utils import remote_encode
from PIL import Image
from safetensors.torch import load

from server import outputs
from server.commands.model_table import describe_all
from server.config import load_settings
from server.listing import families_table
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:50]}"


BLOCKS = [Block(page.name, *found.groups()) for page in PAGES for found in FENCE.finditer(page.read_text())]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """README's first command, with the port that the tests may use."""
    (first,) = [block for block in blocks("sh") if block.text == "make serve\n"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = first.text.strip().replace("make", f"make VENV={sys.prefix}")
    environment = {**os.environ, "VAE_SERVER_PORT": port, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command.split(), cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        for line in server.stderr:
            if line.startswith("ready: "):
                break
        else:
            pytest.fail("make serve ended before it was ready")
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate(timeout=300)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """What the blocks find beside them, with room for what they write."""
    for name in ("server", "models.yaml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "python") and not block.text.startswith("make ")]


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_a_block_runs(block: Block, address: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = block.text.replace("127.0.0.1:8000", address)
    command = (
        ["bash", "-euo", "pipefail", "-c", text]
        if block.language == "sh"
        else [sys.executable, "-W", "error::FutureWarning", "-c", text]
    )
    # The port, because the command `decode` looks for a server there.
    port = address.rpartition(":")[2]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "VAE_SERVER_PORT": port}
    ran = subprocess.run(
        command, cwd=workplace, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "deprecated" not in ran.stderr
    for picture in re.findall(r"\w+\.(?:jpg|png)\b", text):
        with Image.open(workplace / picture) as opened:
            assert opened.size == (512, 512)


@pytest.mark.slow
def test_the_recipe_for_training_goes_on_where_it_stopped(address: str, workplace: Path) -> None:
    (recipe,) = [block.text for block in blocks("python") if block.page == "training.md"]
    text = recipe.replace("127.0.0.1:8000", address)
    subprocess.run([sys.executable, "-c", text], cwd=workplace, check=True, timeout=300)
    first, second = sorted((workplace / "shards").glob("*.tar"))
    written = first.stat().st_mtime_ns
    second.rename(second.with_suffix(".part"))  # as if it had stopped here
    subprocess.run([sys.executable, "-c", text], cwd=workplace, check=True, timeout=300)
    assert sorted((workplace / "shards").iterdir()) == [first, second, workplace / "shards" / "images.txt"]
    assert first.stat().st_mtime_ns == written, "a whole shard is not made again"
    for shard, names in ((first, ["astronaut", "chelsea", "china"]), (second, ["coffee"])):
        with tarfile.open(shard) as tar:
            assert tar.getnames() == [f"{name}.latents.safetensors" for name in names]
            for name, entry in zip(names, tar, strict=True):
                file = tar.extractfile(entry)
                assert file
                latents = load(file.read())["latents"]
                image = Image.open(REPOSITORY / "server" / "demo" / "latents" / f"{name}.jpg")
                expected = remote_encode(f"http://{address}/encode?do_scaling=True&output_dtype=float16", image)
                assert latents.dtype == torch.float16
                assert torch.equal(latents, expected)


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    """As a part of some sentence or code of the server."""
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "server").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    rows = re.findall(r"^\| (.*?) \| ", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows if "in diffusers" not in row for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 12
    assert [text for text in quoted if text not in joined] == []


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text()
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert [page for page in pages if f"({page}" not in index] == []
    for target in re.findall(r"\]\(([^)#]+)", index):
        assert (REPOSITORY / "docs" / target).exists(), target


def test_the_second_command_runs_these_tests() -> None:
    second = blocks("sh")[1].text
    assert second == "make test\n"
    told = subprocess.run(
        ["make", "-n", "test", f"VENV={sys.prefix}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "pytest" in told.stdout
    assert second in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_models_yaml_in_the_docs_is_valid_and_complete(block: Block, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(block.text)
    settings = load_settings(config=tmp_path / "models.yaml")
    entry = next(iter(settings.models.values()))
    assert all(re.search(rf"\b{key}:", block.text) for key in type(entry).model_fields), "every key is shown"


def test_the_readmes_table_of_models_is_what_the_command_prints() -> None:
    command, table = re.findall(r"<!-- made by: (.*?) -->\n(.*?)<!-- end -->", README.read_text(), re.DOTALL)[0]
    assert command == "python -m server models --format markdown"
    settings = load_settings(config=REPOSITORY / "models.yaml")
    assert table == families_table(settings, describe_all(settings)), f"run {command} and put it there"


def test_the_recipe_for_an_output_registers_it() -> None:
    (recipe,) = [block for block in blocks("python") if "FORMATS.append" in block.text]
    before = len(outputs.FORMATS)
    try:
        exec(recipe.text, {})
        assert outputs.format_named("webp").media_types == ("image/webp",)
    finally:
        del outputs.FORMATS[before:]


def test_every_fence_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml", "text"}


def test_every_relative_link_leads_somewhere() -> None:
    for page in [*PAGES, REPOSITORY / "CHANGELOG.md", REPOSITORY / "server" / "demo" / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_figures_page_has_every_figure_that_a_test_measures() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py")]
    promises = {name for source in sources for name in re.findall(r"\bfigure\(\s*f?\"([^\"]+)\"", source)}
    told = set(re.findall(r"^\| ([^|]+) \|", (REPOSITORY / "docs" / "figures.md").read_text(), re.MULTILINE))
    assert promises == told - {"promise", "---"}


def test_every_command_of_the_tables_exists() -> None:
    assert shutil.which("make")
    told = subprocess.run(
        [sys.executable, "-m", "server", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for command in ("serve", "models", "check", "download", "decode", "encode", "completion"):
        assert f"  {command} " in told.stdout
