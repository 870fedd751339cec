"""`make serve` and the program that installs the packages: what it says, and that it looks at the port first."""

from __future__ import annotations

import functools
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.install import address_of, build_of, port_problem, python_problem, size_of, summary
from tests.conftest import REPOSITORY


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_is_told_before_anything_is_installed(taken: int, tmp_path: Path) -> None:
    command = ["make", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", "serve", f"ARGS=--port {taken}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"port {taken} of 127.0.0.1 cannot be used (Address already in use)" in done.stderr
    assert f'make serve ARGS="--port {taken + 1}"' in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_free_port_is_no_problem(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert port_problem("--port 0") is None
    assert python_problem() is None
    monkeypatch.setenv("VAE_SERVER_PORT", str(taken))
    assert str(taken) in (port_problem("") or "")
    assert address_of("--device cpu --port=1234 --host 0.0.0.0 flux") == ("0.0.0.0", 1234)
    assert address_of("--port nonsense") == ("127.0.0.1", 0), "serve itself refuses it"


@pytest.mark.parametrize(
    ("version", "needs", "build"),
    [
        ("2.13.0+cpu", [], "CPUs"),
        ("2.13.0", ['nvidia-cublas==13.0; platform_system == "Linux"'], "CUDA GPUs"),
        ("2.11.0+cu130", [], "CUDA GPUs"),
        ("2.13.0+rocm7.0", [], "ROCm GPUs"),
        ("2.13.0", ["sympy"], "CPUs"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="a build without a local version is another one there")
def test_the_build_of_torch_is_named(version: str, needs: list[str], build: str) -> None:
    assert build_of({"version": version, "requires_dist": needs}) == build


def test_the_sizes_are_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "torch 1.whl").write_bytes(bytes(5_000_000))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as index:
        threading.Thread(target=index.serve_forever).start()
        url = f"http://127.0.0.1:{index.server_port}/torch%201.whl"
        assert size_of(url) == 5_000_000
        assert size_of(url + "no") is None
        index.shutdown()
    local = (tmp_path / "torch 1.whl").as_uri()
    metadata = {"name": "torch", "version": "2.13.0", "requires_dist": ["nvidia-nccl"]}
    said = summary([{"metadata": metadata, "download_info": {"url": local}}], Path(".venv"))
    assert "1 packages, 5 MB to download unless they are cached, about 11 MB in .venv" in said
    assert "torch 2.13.0 for CUDA GPUs; a build for CPUs: TORCH_INDEX_URL=… make serve" in said
    said = summary(
        [{"metadata": {**metadata, "version": "2.13.0+cpu"}, "download_info": {"url": local}}], Path(".venv")
    )
    assert "about 20 MB in .venv" in said
    assert "a build for other devices" in said
