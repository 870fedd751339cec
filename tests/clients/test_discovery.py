"""Servers that advertise themselves on the local network, and the clients that find them, on the loopback interface."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import remote_vae
from remote_vae import SERVICE_TYPE, FoundServer, RemoteVAE

from server.commands.advertising import Advertisement, addresses_of, name_for_clients
from server.commands.serving import bind
from server.config import load_settings
from server.errors import ConfigError
from tests.clients.stand_in import Cancelled, ComfyUI, load
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
        flags = "--advertise", "--allowed-hosts", "localhost,127.0.0.1"  # for clients on this machine
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


def told(addresses: tuple[str, ...] = ("192.168.0.7",), port: int = 8000, **properties: str) -> Any:
    """A record as zeroconf gives it."""
    return SimpleNamespace(
        name=f"box.{SERVICE_TYPE}",
        port=port,
        properties={key.encode(): value.encode() for key, value in properties.items()},
        parsed_addresses=lambda: list(addresses),
    )


@pytest.mark.parametrize(
    ("info", "addresses"),
    [
        (told(path="/", tls="0"), ["http://192.168.0.7:8000/"]),
        (told(path="/", tls="1", host="vae.example"), ["https://vae.example:8000/"]),
        (told(host="fd00::7"), ["http://[fd00::7]:8000/"]),
        (told(("fe80::1", "fd00::7", "10.8.0.2", "192.168.0.7")),
         ["http://10.8.0.2:8000/", "http://192.168.0.7:8000/", "http://[fd00::7]:8000/"]),
    ],
)  # fmt: skip
def test_a_record_becomes_addresses(found: Any, info: Any, addresses: list[str]) -> None:
    assert FoundServer.all_of(info) == [FoundServer("box", address, False, "") for address in addresses]
    nodes = sys.modules[found.Neighbors.__module__]
    assert nodes.addresses_of(info) == [address.rstrip("/") for address in addresses]


NO_HOSTS = ["user@elsewhere", "a/b", "]", "a]b", "[x", "a:b:c", "\u2100.com", "a b", "a..b", "fe80::1", "fe80::1%eth0"]


@pytest.mark.parametrize("info", [told(()), told(path="@elsewhere/"), *(told(host=host) for host in NO_HOSTS)])
def test_a_record_that_is_no_address_is_left_out(found: Any, info: Any) -> None:
    assert FoundServer.all_of(info) == []
    if info.properties.keys() != {b"path"}:  # which the nodes do not read
        assert sys.modules[found.Neighbors.__module__].addresses_of(info) == []


@pytest.fixture
def network() -> Iterator[Any]:
    """A program that publishes records on the loopback interface."""
    zeroconf = pytest.importorskip("zeroconf", reason="requirements-advertise.txt is not installed")
    with zeroconf.Zeroconf(list(LOOPBACK)) as program:
        yield program


def publish(network: Any, port: int, addresses: list[str], **properties: str) -> str:
    """Publish the record of a server, and return its name."""
    import zeroconf

    name = f"test-{uuid.uuid4().hex}"
    server, place = f"{name}.local.", f"{name}.{SERVICE_TYPE}"
    network.register_service(
        zeroconf.ServiceInfo(
            SERVICE_TYPE, place, port=port, properties=properties, server=server, parsed_addresses=addresses
        )
    )
    return name


def both_find(found: Any, name: str) -> str:
    """The address that both clients find for a name."""
    browse = sys.modules[found.Neighbors.__module__].browse
    seen: dict[str, str] = {}

    def is_found() -> bool:
        seen.update({each.name: each.address for each in RemoteVAE.servers(interfaces=LOOPBACK)})
        return name in seen

    until(is_found, "the server for RemoteVAE", 0)
    by_nodes: dict[str, str] = {}

    def is_found_by_nodes() -> bool:
        by_nodes.update(browse(LOOPBACK))
        return name in by_nodes

    until(is_found_by_nodes, "the server for the nodes", 0)
    assert by_nodes[name] + "/" == seen[name]
    return seen[name]


@pytest.mark.slow
def test_of_several_addresses_one_that_accepts_a_connection_is_used(found: Any, network: Any) -> None:
    addresses = [f"127.0.0.{last}" for last in range(2, 8)]
    for wanted in ("127.0.0.3", "127.0.0.6"):
        with bind(wanted, 0) as listener:
            port = listener.getsockname()[1]
            name = publish(network, port, addresses)
            assert both_find(found, name) == f"http://{wanted}:{port}/"


def test_an_address_of_another_machine_goes_before_one_of_this_machine(found: Any) -> None:
    """A connection to 127.0.0.5 has another address at its other end, as one to another machine has."""
    nodes = sys.modules[found.Neighbors.__module__]
    with bind("0.0.0.0", 0) as listener, bind("127.0.0.1", 0) as own:
        everywhere, here = listener.getsockname()[1], own.getsockname()[1]
        for hosts, port, wanted in (
            (["127.0.0.1", "127.0.0.5", "127.0.0.6"], everywhere, "127.0.0.5"),
            (["127.0.0.5", "127.0.0.1"], here, "127.0.0.1"),
            (["127.0.0.5", "127.0.0.6"], here, None),
        ):
            info = told(tuple(hosts), port=port)
            servers = dict(zip(hosts, FoundServer.all_of(info), strict=True))
            assert asyncio.run(remote_vae._reachable(list(servers.values()))) == servers.get(wanted)
            addresses = dict(zip(hosts, nodes.addresses_of(info), strict=True))
            assert asyncio.run(nodes._reachable(list(addresses.values()))) == addresses.get(wanted)


@pytest.mark.slow
def test_bad_records_of_others_hide_no_server_and_take_no_time(found: Any, network: Any) -> None:
    import zeroconf
    from zeroconf import const

    about = const._TYPE_PTR, const._CLASS_IN, 10
    strangers = zeroconf.DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
    targets = [f"ghost{number}.{SERVICE_TYPE}" for number in range(40)]  # which nobody describes
    for target in ["box._other._tcp.local.", *targets]:
        strangers.add_answer_at_time(zeroconf.DNSPointer(SERVICE_TYPE, *about, target), 0)
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.1):
            network.send(strangers)

    with bind("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as sender:
        sending = sender.submit(send)
        try:
            port = listener.getsockname()[1]
            publish(network, port, ["127.0.0.1"], host="]")
            name = publish(network, port, ["127.0.0.1"])
            assert both_find(found, name) == f"http://127.0.0.1:{port}/"
            began = time.monotonic()
            RemoteVAE.servers(interfaces=LOOPBACK)
            sys.modules[found.Neighbors.__module__].browse(LOOPBACK)
            assert time.monotonic() - began < 60, "less than the time to wait for all of them one after the other"
        finally:
            ended.set()
        sending.result()


def test_the_node_of_comfyui_does_not_wait_for_a_search_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfy = ComfyUI(tmp_path)
    nodes = load(comfy, monkeypatch).nodes
    ended = threading.Event()
    nodes.neighbors = nodes.Neighbors(lambda: ended.wait() and {})
    node = nodes.NODE_CLASS_MAPPINGS["VAEServerFind"]

    def cancel() -> None:
        raise Cancelled

    try:
        comfy.on_look = cancel
        with pytest.raises(Cancelled):
            node().run("box")
        nodes.neighbors.LONGEST_S = 0.2
        with pytest.raises(RuntimeError, match="no server 'box' was found"):
            node.IS_CHANGED("box")
    finally:
        ended.set()


@pytest.mark.parametrize(
    ("allowed", "name"),
    [
        (None, None),
        ("*", None),
        ("localhost,127.0.0.1,[::1],vae.lan,box", "vae.lan"),
        ("LOCALHOST, 10.0.0.7", "10.0.0.7"),
    ],
)
def test_other_machines_get_a_name_that_is_allowed_and_not_their_own(allowed: str | None, name: str | None) -> None:
    assert name_for_clients(allowed, is_local=False) == name


def test_programs_of_this_machine_get_the_first_name() -> None:
    assert name_for_clients("localhost,vae.lan", is_local=True) == "localhost"
    assert name_for_clients("", is_local=True) is None


@pytest.mark.parametrize("allowed", ["", " , ", "localhost,127.0.0.1", "::1"])
def test_without_a_name_for_other_machines_the_server_does_not_start(
    models_yaml: Path, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zeroconf", reason="requirements-advertise.txt is not installed")
    monkeypatch.delenv("VAE_SERVER_ALLOWED_HOSTS", raising=False)
    settings = load_settings(config=models_yaml, host="0.0.0.0", advertise=True, allowed_hosts=allowed)
    with bind("0.0.0.0", 0) as listener, pytest.raises(ConfigError, match="add the name or the IP address"):
        Advertisement(settings, listener)


INTERFACES = {
    "lo": [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")],
    "eth0": [(socket.AF_INET6, "fd00::7"), (socket.AF_INET6, "fe80::7%eth0"), (socket.AF_INET, "192.168.0.7")],
    "docker0": [(socket.AF_INET, "172.17.0.1"), (socket.AF_INET6, "fe80::8%docker0")],
}


def listening(host: str, is_ipv6_only: bool = False) -> Any:
    """What `addresses_of` needs of a socket. Not every machine that runs the tests has IPv6."""
    return SimpleNamespace(
        family=socket.AF_INET6 if ":" in host else socket.AF_INET,
        getsockname=lambda: (host, 8000),
        getsockopt=lambda *_: int(is_ipv6_only),
    )


@pytest.mark.parametrize(
    ("listener", "addresses"),
    [
        (listening("0.0.0.0"), ["192.168.0.7", "172.17.0.1"]),
        (listening("::"), ["192.168.0.7", "172.17.0.1", "fd00::7"]),
        (listening("::", is_ipv6_only=True), ["fd00::7"]),
        (listening("192.168.0.7"), ["192.168.0.7"]),
        (listening("::1"), ["::1"]),
    ],
)
def test_only_addresses_at_which_the_server_listens_are_published(
    listener: Any, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: [SimpleNamespace(family=family, address=address) for family, address in each]
             for name, each in INTERFACES.items()}  # fmt: skip
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    assert addresses_of(listener) == addresses


def test_a_link_local_address_cannot_be_advertised() -> None:
    with pytest.raises(ConfigError, match=r"listens on fe80::7, .* choose another --host"):
        addresses_of(listening("fe80::7"))


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
