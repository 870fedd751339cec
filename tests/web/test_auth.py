"""Keys: three ways to send one, and everything closed without but health."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest
import requests

from server.config import ServerOptions
from server.web.routes import all_routes
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.test_errors import BINARY, assert_refused, post

OPEN = {"/health", "/health/live", "/ping"}


@pytest.fixture
def locked(serve: Serve, vaes: dict[str, LocalVae], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    keys = tmp_path / "keys"
    keys.write_text("first\n\nalice: sécret\n")
    monkeypatch.setenv("VAE_SERVER_API_KEY", "fourth, ci: fifth")
    return serve({"sd": {"repo": str(vaes["sd"].folder)}}, api_key_file=keys)


def test_every_route_but_health_is_closed(locked: str) -> None:
    """A new route is closed unless it is written here and in PUBLIC_PATHS."""
    for route in all_routes(ServerOptions()):
        for method in route.methods or ():
            path = route.path.replace("{model:model}", "sd")
            response = requests.request(method, locked.rstrip("/") + path, timeout=300)
            if path in OPEN:
                assert response.status_code == 200
            elif method == "HEAD":
                assert response.status_code == 401
            else:
                assert_refused(response, 401, "unauthorized", "a key is required")
                assert response.raw.headers.getlist("www-authenticate") == [
                    "Bearer",
                    'Basic realm="vae", charset="UTF-8"',
                ]


@pytest.mark.parametrize("path", ["nobody/here", "health/more", "health/live/x", "Health", "//health"])
def test_what_is_no_route_is_closed_too(locked: str, path: str) -> None:
    assert_refused(requests.get(locked + path, timeout=300), 401, "unauthorized", "a key is required")


@pytest.mark.parametrize("key", ["first", "sécret", "fourth", "fifth"])
def test_each_key_opens_in_each_way(locked: str, key: str) -> None:
    basic = base64.b64encode(b"me:" + key.encode())
    for headers in (
        {"Authorization": b"Bearer " + key.encode()},
        {"Authorization": b"bearer  " + key.encode()},
        {"Authorization": b"Basic " + basic},
        {"X-API-Key": key.encode()},
    ):
        assert post(locked, headers={**BINARY, **headers}).ok


def test_the_address_of_an_unmodified_client_may_hold_the_key(locked: str) -> None:
    assert post(locked.replace("http://", "http://me:fourth@")).ok


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "alice"},
        {"X-API-Key": "alice: sécret".encode()},
        {"X-API-Key": "firs"},
        {"X-API-Key": "firstt"},
        {"Authorization": "first"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic ***"},
        {"Authorization": "Basic Zmlyc3Q="},
        {"Authorization": "Digest first"},
    ],
    ids=str,
)
def test_what_is_no_key_opens_nothing(locked: str, headers: dict[str, str]) -> None:
    assert_refused(
        post(locked, headers={**BINARY, **headers}),
        401,
        "unauthorized",
        "does not know the key that was sent: send|a key is required: send",
    )


def test_the_log_names_the_caller_and_shows_no_key(locked: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in ("first", "sécret", "fifth", "wrong-key"):
            post(locked, headers={**BINARY, "X-API-Key": key.encode()})
    callers = [record.__dict__["caller"] for record in caplog.records if record.name == "server.web.request_scope"]
    assert callers == ["key-1", "alice", "ci", None]
    for key in ("first", "sécret", "fifth", "wrong-key"):
        assert not any(key in str(record.__dict__) for record in caplog.records)
