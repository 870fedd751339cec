"""What a terminal shows while a command works, and that a pipe gets nothing of it."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file

from server.commands.servers import Place
from server.commands.status_line import START_OF_LINE, StatusLine
from tests.commands.terminal import on_terminal
from tests.commands.test_cli import run
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.waiting import until

Vaes = dict[str, LocalVae]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def last_line(shown: str) -> str:
    """What remains in the last line."""
    return shown.rpartition(START_OF_LINE)[2]


@pytest.mark.slow
def test_a_decode_shows_its_stages_on_a_terminal_only(models_yaml: Path, vaes: Vaes, tmp_path: Path) -> None:
    latents = tmp_path / "latents.safetensors"
    save_file({"latents": vaes["sd"].latents(8, 12)}, latents)
    words = ("decode", latents, tmp_path / "out.png", "--config", models_yaml)
    ran = on_terminal(*words)
    assert ran.returncode == 0, ran.shown
    stages = re.findall(r"(starting torch|loading sd|decoding with sd) … \d+ s", ran.shown)
    assert list(dict.fromkeys(stages)) == ["starting torch", "loading sd", "decoding with sd"]
    assert last_line(ran.shown) == ""
    assert ran.stdout.startswith(f"{tmp_path / 'out.png'}: 96x64 pixels, ")
    assert run(*words).stderr == ""


@pytest.mark.slow
def test_check_shows_its_findings_in_lines_of_their_own(models_yaml: Path) -> None:
    ran = on_terminal("check", "sd", "--config", models_yaml)
    assert ran.returncode == 0, ran.shown
    assert "checking … " in ran.shown
    assert all(line.startswith("ok  ") for line in ran.stdout.splitlines())


def test_a_request_to_a_server_shows_how_far_it_is(serve: Serve, vaes: Vaes, held_video: threading.Event) -> None:
    url = serve({"hunyuan": {"repo": str(vaes["hunyuan"].folder)}})
    latents, terminal = vaes["hunyuan"].latents(5, 4, 6), Terminal()
    query = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4"}

    def ask() -> None:
        with StatusLine(terminal) as line:
            Place(url).ask("", query, latents.numpy().tobytes(), {"Content-Type": "tensor/binary"}, line)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        until(lambda: re.search(r"waiting for http://\S+ … \d+ s, \d+%", terminal.getvalue()) is not None, "progress")
    finally:
        held_video.set()
        asking.join()
    assert last_line(terminal.getvalue()) == ""


def test_nothing_is_written_to_a_file() -> None:
    stream = io.StringIO()
    with StatusLine(stream) as line, line.doing("working", lambda: "halfway"):
        line.clear()
    assert stream.getvalue() == ""


def test_a_failure_leaves_an_empty_line() -> None:
    terminal = Terminal()
    with pytest.raises(ValueError, match="broken"), StatusLine(terminal) as line, line.doing("working"):
        raise ValueError("broken")
    assert "working" in terminal.getvalue()
    assert last_line(terminal.getvalue()) == ""


@pytest.mark.parametrize("kind", ["", "dumb"])
def test_a_terminal_that_cannot_erase_a_line_gets_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", kind)
    terminal = Terminal()
    with StatusLine(terminal) as line, line.doing("decoding"):
        pass
    assert terminal.getvalue() == ""
