"""Servers that advertise themselves on the local network, and the clients that find them, on the loopback interface."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from remote_vae import SERVICE_TYPE, FoundServer, RemoteVAE

from tests.clients.stand_in import ComfyUI, load
from tests.conftest import REPOSITORY
from tests.load import process
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

LOOPBACK = ("127.0.0.1",)


def found_at(url: str) -> FoundServer:
    """The server of this address, once the client has found it."""
    found: list[FoundServer] = []

    def is_found() -> bool:
        found.extend(each for each in RemoteVAE.servers(interfaces=LOOPBACK) if each.address == url)
        return bool(found)

    until(is_found, "the server on the network", 0)
    return found[0]


@pytest.mark.slow
def test_a_client_finds_a_server_until_it_drains(models_yaml: Path, vaes: dict[str, LocalVae]) -> None:
    zeroconf = pytest.importorskip("zeroconf", reason="requirements-advertise.txt is not installed")
    log: list[str] = []
    seen: list[tuple[str, Any]] = []

    def on_change(name: str, state_change: Any, **_: Any) -> None:
        seen.append((name.removesuffix(f".{SERVICE_TYPE}"), state_change))

    flags = "--advertise", "--drain-timeout-s", str(PATIENCE_S), "--drain-notice-s", str(PATIENCE_S)
    with process(models_yaml, *flags, log=log) as (url, server), process(models_yaml) as (silent, _):
        found = found_at(url)
        assert not found.needs_key
        assert found.version
        assert silent not in [each.address for each in RemoteVAE.servers(interfaces=LOOPBACK)]
        latents = vaes["sd"].latents(6, 8)
        sample = RemoteVAE(found.address + "sd").decode(latents).sample
        assert (sample - vaes["sd"].decode(latents).clamp(-1, 1)).abs().max() <= 0.51 / 127.5

        async def inside_an_event_loop() -> FoundServer:
            return found_at(url)

        assert asyncio.run(inside_an_event_loop()) == found
        with zeroconf.Zeroconf(list(LOOPBACK)) as network:
            zeroconf.ServiceBrowser(network, SERVICE_TYPE, handlers=[on_change])
            until(lambda: (found.name, zeroconf.ServiceStateChange.Added) in seen, "the server on the network")
            server.send_signal(signal.SIGTERM)
            until(lambda: (found.name, zeroconf.ServiceStateChange.Removed) in seen, "the server's farewell")
        assert server.poll() is None, "it still waits for clients that do not know yet"
        server.send_signal(signal.SIGTERM)
    assert "only programs of this machine can find it" in "".join(log)


@pytest.mark.slow
def test_two_servers_of_one_machine_are_told_apart_and_no_key_is_told(
    models_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroconf = pytest.importorskip("zeroconf", reason="requirements-advertise.txt is not installed")
    with process(models_yaml, "--advertise") as (first, _):
        monkeypatch.setenv("VAE_SERVER_API_KEY", "hush-hush")
        flags = "--advertise", "--allowed-hosts", "localhost,127.0.0.1"
        with process(models_yaml, *flags) as (second, _):
            plain, locked = found_at(first), found_at(second.replace("127.0.0.1", "localhost"))
            assert plain.name.endswith(f"-{urlsplit(first).port}")
            assert plain.name != locked.name
            assert (plain.needs_key, locked.needs_key) == (False, True)
            with zeroconf.Zeroconf(list(LOOPBACK)) as network:
                name = f"{locked.name}.{SERVICE_TYPE}"
                info = network.get_service_info(SERVICE_TYPE, name, timeout=1000 * PATIENCE_S)
            assert info.properties == {
                b"path": b"/",
                b"tls": b"0",
                b"key": b"1",
                b"version": locked.version.encode(),
                b"host": b"localhost",
            }


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the ComfyUI nodes that finds servers, on the loopback interface, and the nodes."""
    nodes = load(ComfyUI(tmp_path), monkeypatch).nodes
    monkeypatch.setattr(
        nodes, "neighbors", nodes.Neighbors(lambda: sys.modules[nodes.Neighbors.__module__].browse(LOOPBACK))
    )
    return nodes


@pytest.mark.slow
def test_the_node_of_comfyui_gives_the_address_of_a_server(found: Any, models_yaml: Path) -> None:
    pytest.importorskip("zeroconf", reason="requirements-advertise.txt is not installed")
    node = found.NODE_CLASS_MAPPINGS["VAEServerFind"]

    def menu() -> list[str]:
        return list(node.INPUT_TYPES()["required"]["server"][0])

    with process(models_yaml, "--advertise") as (url, _):
        name = found_at(url).name
        found.neighbors.FRESH_S = 0
        until(lambda: name in menu(), "the name of the server in the menu")
        assert node().run(name) == (url.rstrip("/"),)
        assert node.IS_CHANGED(name) == url.rstrip("/")
        with pytest.raises(RuntimeError, match=rf"no server 'other' was found on the local network; found: .*{name}"):
            node().run("other")


def test_without_the_package_the_node_of_comfyui_says_so(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    node = found.NODE_CLASS_MAPPINGS["VAEServerFind"]
    sentence = "to find servers, install zeroconf in ComfyUI's Python: python -m pip install zeroconf"
    until(lambda: node.INPUT_TYPES()["required"]["server"][0] == [sentence], "the sentence in the menu")
    with pytest.raises(RuntimeError, match=sentence):
        node().run("box")


def test_a_node_whose_address_another_node_gives_is_compared_by_that_node(found: Any) -> None:
    """ComfyUI gives None for such an input."""
    node = found.NODE_CLASS_MAPPINGS["VAEServerDecode"]
    assert node.IS_CHANGED(model="sd", address=None) == node.IS_CHANGED(model="sd")


def told(addresses: tuple[str, ...] = ("192.168.0.7",), **properties: str) -> Any:
    """A record as zeroconf gives it."""
    return SimpleNamespace(
        name=f"box.{SERVICE_TYPE}",
        port=8000,
        properties={key.encode(): value.encode() for key, value in properties.items()},
        parsed_addresses=lambda: list(addresses),
    )


@pytest.mark.parametrize(
    ("info", "address"),
    [
        (told(path="/", tls="0"), "http://192.168.0.7:8000/"),
        (told(path="/", tls="1", host="vae.example"), "https://vae.example:8000/"),
        (told(("fe80::1",)), "http://[fe80::1]:8000/"),
    ],
)
def test_a_record_becomes_an_address(found: Any, info: Any, address: str) -> None:
    assert FoundServer.of(info) == FoundServer("box", address, False, "")
    assert sys.modules[found.Neighbors.__module__].address_of(info) == address.rstrip("/")


@pytest.mark.parametrize("info", [told(()), told(path="@elsewhere/"), told(host="user@elsewhere"), told(host="a/b")])
def test_a_record_that_is_no_address_is_left_out(found: Any, info: Any) -> None:
    assert FoundServer.of(info) is None
    if info.properties.keys() != {b"path"}:  # which the nodes do not read
        assert sys.modules[found.Neighbors.__module__].address_of(info) is None


def test_without_the_package_a_sentence_says_how_to_install_it(
    models_yaml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "zeroconf.py").write_text("raise ModuleNotFoundError('zeroconf')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "server", "serve", "--advertise", "--port", "0", "--config", str(models_yaml)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "error: --advertise needs the package zeroconf; run: pip install zeroconf (it is the extra `advertise`)"
    )
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(ModuleNotFoundError, match="to find servers, install the package zeroconf: pip install"):
        RemoteVAE.servers(0)
