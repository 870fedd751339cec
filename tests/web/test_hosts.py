"""Which Host is answered: a page whose name was made to lead to this machine gets nothing."""

from __future__ import annotations

import pytest
import requests

from server.config import ServerOptions
from server.web.hosts import CheckHost
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.raw import connected, head
from tests.web.test_protocol import assert_refused

LOOPBACK = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"]
FOREIGN = ["evil.example", "localhost.evil.example", "10.0.0.1", "[fe80::1]", "127.0.0.1.evil.example", "0.0.0.0"]
NO_HOST = ["", "a b", "user@localhost", "localhost:1:2", "localhost,evil.example", "[::1", "localhost/", "ľocalhost"]


def status_of(url: str, *lines: str, target: str = "/models") -> int:
    with connected(url) as client:
        client.send("\r\n".join([f"GET {target} HTTP/1.1", *lines, "", ""]).encode())
        return client.answer().status


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_server_answers_for_loopback(url: str, host: str) -> None:
    assert status_of(url, f"Host: {host}") == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_loopback_server_answers_for_no_other_name(url: str, host: str) -> None:
    with connected(url) as client:
        client.send(head("GET", "/models", host=host))
        answer = client.answer()
    assert_refused(answer, 421, "wrong_host", "--allowed-hosts")
    assert host not in answer.body.decode()


@pytest.mark.parametrize("host", NO_HOST)
def test_a_host_that_is_none_is_400(url: str, host: str) -> None:
    assert status_of(url, f"Host: {host}") == 400


def test_no_host_and_two_hosts_are_400(url: str) -> None:
    with connected(url) as client:
        client.send(b"GET /models HTTP/1.1\r\n\r\n")
        assert_refused(client.answer(), 400, "bad_request", "exactly one Host header")
    assert status_of(url, "Host: localhost", "Host: localhost") == 400


def test_probes_may_name_any_address_and_no_other_name(url: str) -> None:
    for path in ("/health", "/health/live", "/health/", "/ping"):
        assert status_of(url, "Host: 10.1.2.3:8000", target=path) == 200
        assert status_of(url, "Host: [fd00::7]:8000", target=path) == 200
        assert status_of(url, "Host: evil.example", target=path) == 421


def test_named_hosts_are_answered_and_no_others(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, allowed_hosts="vae.example, 10.0.0.1")
    for host, status in [("vae.example:80", 200), ("10.0.0.1", 200), ("Vae.Example.", 200), ("localhost", 421)]:
        assert status_of(address, f"Host: {host}") == status


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "is_answered"),
    [
        ("0.0.0.0", None, "anything.example", True),
        ("::", None, "anything.example", True),
        ("192.168.1.5", None, "anything.example", True),
        ("::1", None, "anything.example", False),
        ("localhost", None, "anything.example", False),
        ("localhost", "*", "anything.example", True),
        ("0.0.0.0", "vae.example", "anything.example", False),
    ],
)
def test_the_default_goes_by_the_address_that_is_bound(
    bound: str, allowed: str | None, host: str, is_answered: bool
) -> None:
    async def unused(*_: object) -> None:
        raise AssertionError

    check = CheckHost(unused, ServerOptions(host=bound, allowed_hosts=allowed))
    scope = {"method": "GET", "path": "/", "http_version": "1.1", "headers": [(b"host", host.encode())]}
    assert (check._refusal(scope) is None) is is_answered


def test_a_page_of_another_origin_is_granted_nothing(url: str) -> None:
    """See test_origins.py for what it is told."""
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asks |= {"Access-Control-Request-Headers": "content-type", "Access-Control-Request-Private-Network": "true"}
    for method, path in [("OPTIONS", ""), ("OPTIONS", "sd"), ("GET", "models"), ("POST", ""), ("GET", "health")]:
        response = requests.request(method, url + path, headers=asks, timeout=300)
        assert not [name for name in response.headers if name.lower().startswith("access-control-")]
