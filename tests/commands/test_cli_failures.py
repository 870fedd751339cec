"""What the command line says of other programs' answers, odd addresses, closed streams and Ctrl-C."""

from __future__ import annotations

import http.server
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from server.commands import servers
from server.commands.local_files import output_of
from server.commands.servers import find
from tests.commands.test_cli import assert_one_sentence, invoke
from tests.conftest import REPOSITORY


class Says(http.server.BaseHTTPRequestHandler):
    """A program that answers every request with `ok`."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Endless(http.server.BaseHTTPRequestHandler):
    """A program whose answers do not end. pause_s: between two pieces."""

    pause_s = 0.0
    ended = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while not self.ended.wait(self.pause_s):
                self.wfile.write(bytes(1 << 16) if not self.pause_s else b"[")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_a_program_whose_answer_does_not_end_is_not_used(pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIND_S", (1, 1))
    handler = type("Handler", (Endless,), {"pause_s": pause_s, "ended": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever).start()
        try:
            assert find(other.server_port, None) is None
        finally:
            handler.ended.set()
            other.shutdown()


def test_the_answer_of_another_program_is_no_picture_and_no_latents(
    url: str, latents_file: Path, tmp_path: Path
) -> None:
    out, picture = tmp_path / "out.png", tmp_path / "in.png"
    assert invoke("decode", latents_file, picture, "--server", url).returncode == 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says) as other:
        threading.Thread(target=other.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{other.server_port}/"
            ran = invoke("decode", latents_file, out, "--server", address)
            assert_one_sentence(ran, "did not answer with image/png; is this a VAE decode server", 2)
            assert not out.exists()
            ran = invoke("encode", picture, tmp_path / "out.safetensors", "--server", address)
            assert_one_sentence(ran, "did not answer with a tensor; is this a VAE decode server", 2)
        finally:
            other.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host", "not the URL of a server"),
        ("http://[", "not the URL of a server"),
        ("http://:80", "not the URL of a server"),
        ("http://host:port", "not the URL of a server"),
        ("host:8000", "write http://host:8000"),
        ("host", "write http://host"),
    ],
)
def test_an_address_that_is_none(address: str, words: str, latents_file: Path, tmp_path: Path) -> None:
    assert_one_sentence(invoke("decode", latents_file, tmp_path / "out.png", "--server", address), words, 2)


def test_https_to_a_server_without_it_says_so(url: str, latents_file: Path, tmp_path: Path) -> None:
    address = url.replace("http://", "https://")
    ran = invoke("decode", latents_file, tmp_path / "out.png", "--server", address)
    assert_one_sentence(ran, "does not speak HTTPS; write http://", 2)


def test_every_suffix_that_the_message_offers_works(latents_file: Path, tmp_path: Path) -> None:
    ran = invoke("decode", latents_file, tmp_path / "out.nothing")
    for suffix in re.findall(r"\.[\w-]+", ran.stderr.partition("use one of")[2]):
        assert output_of(tmp_path / f"out{suffix}")[0]


@pytest.mark.parametrize("streams", ["2>&-", ">/dev/full"])
def test_streams_that_cannot_be_written_to(streams: str, models_yaml: Path, latents_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    command = f"{sys.executable} -m server decode {latents_file} {out} --no-server --config {models_yaml} {streams}"
    ran = subprocess.run(
        command, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )  # streams are redirected
    assert out.exists()
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
    assert (ran.returncode, "the output cannot be written" in ran.stderr) in ((0, False), (1, True))


def test_ctrl_c_while_it_imports_leaves_no_traceback() -> None:
    script = (
        "import runpy, signal, sys; sys.modules['server.commands.cli'] = type(sys)('cli'); "
        "sys.modules['server.commands.cli'].__getattr__ = lambda name: signal.raise_signal(signal.SIGINT); "
        "runpy.run_module('server', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")
