"""Pages of other sites: refused, unless --cors-origins lists them; then they may send what they like and read every answer."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from server.config import ServerOptions, load_settings
from server.errors import ConfigError
from server.web.origins import EXPOSED, CheckOrigin
from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.test_errors import BINARY, BODY, GOOD, assert_refused

APP = "https://app.example"
EVIL = "https://evil.example"


def ask(url: str, method: str = "POST", path: str = "", **headers: str) -> requests.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        return requests.post(url + path, BODY, params=GOOD, headers={**BINARY, **sent}, timeout=30)
    return requests.request(method, url + path, headers=sent, timeout=30)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Origin": EVIL},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Origin": EVIL},
    ],
    ids=str,
)
def test_a_page_of_another_site_is_refused(url: str, headers: dict[str, str]) -> None:
    """Also a form that it submits, which navigates."""
    refused = ask(url, **headers)
    assert_refused(refused, 403, "cross_site", "list the page's origin in --cors-origins")
    assert not [name for name in refused.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("path", ["", "models", "metrics", "openapi.json", "sd"])
def test_it_reads_nothing_either(url: str, path: str) -> None:
    for method in ("GET", "OPTIONS"):
        assert_refused(
            ask(url, method, path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors"), 403, "cross_site", ""
        )
        assert ask(url, method, path, Origin=EVIL).status_code == 403
    embedded = ask(url, "GET", path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe")
    assert embedded.status_code == 403


def test_the_servers_own_page_clients_links_and_probes_are_answered(url: str) -> None:
    own = url.rstrip("/")
    for headers in (
        {},
        {"Origin": own},
        {"Origin": own, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Mode": "cors"},  # Node's fetch
        {"Origin": "https://vae.example", "Sec-Fetch-Site": "same-origin"},  # behind a proxy that changes the Host
    ):
        assert ask(url, **headers).ok, headers
    for path in ("", "models"):
        followed = ask(
            url, "GET", path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document"
        )
        assert followed.ok
    for path in ("health", "health/live", "ping"):
        assert ask(url, "GET", path, Origin=EVIL, Sec_Fetch_Site="cross-site").ok


@pytest.mark.parametrize(
    ("origin", "host", "is_answered"),
    [
        ("https://vae.example", "vae.example", True),  # TLS at a proxy
        ("https://vae.example", "VAE.example:443", True),
        ("https://vae.example:8443", "vae.example:8443", True),
        ("http://vae.example", "vae.example:80", True),
        ("https://vae.example", "vae.example:80", False),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://vae.example:8000", "vae.example", False),
        ("http://other.example", "vae.example", False),
        ("vae.example", "vae.example", False),
    ],
)
def test_an_origin_is_compared_with_the_host(origin: str, host: str, is_answered: bool) -> None:
    from server.web import origins

    scope: dict[str, Any] = {"method": "POST", "path": "/"}
    headers = origins.Headers({"origin": origin, "host": host})
    assert origins._is_foreign(scope, headers) is not is_answered


@pytest.fixture
def granting(serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    models = {"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}
    return serve(models, cors_origins=f"{APP}, https://b.example:8443,null")


@pytest.mark.parametrize("origin", [APP, "https://b.example:8443", "null"])
def test_a_listed_page_may_ask_and_read_every_answer(granting: str, origin: str) -> None:
    asked = {
        "Origin": origin,
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type,x-request-id",
        "Access_Control_Request_Private_Network": "true",
        "Sec_Fetch_Site": "cross-site",
    }
    allowed = ask(granting, "OPTIONS", "sd", **asked)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert allowed.headers["access-control-allow-headers"] == asked["Access_Control_Request_Headers"]
    assert allowed.headers["access-control-allow-private-network"] == "true"
    assert allowed.headers["x-request-id"]
    answers = [
        (200, ask(granting, Origin=origin, Sec_Fetch_Site="cross-site", X_API_Key="secret")),
        (401, ask(granting, Origin=origin, Sec_Fetch_Site="cross-site")),
        (404, ask(granting, "GET", "a/b/c", Origin=origin, X_API_Key="secret")),
        (421, ask(granting, "GET", "models", Origin=origin, Host="other.example")),
    ]
    for status, answer in answers:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origin
        assert {"shape", "dtype", "X-Request-Id", "Server-Timing", "Retry-After"} <= set(EXPOSED.split(", "))
        assert answer.headers["access-control-expose-headers"] == EXPOSED
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers


def test_an_unlisted_page_is_refused_as_before(granting: str) -> None:
    for origin in (EVIL, "https://app.example.evil.example", "https://app.example:1", "http://app.example"):
        for method in ("POST", "OPTIONS"):
            refused = ask(granting, method, Origin=origin, X_API_Key="secret", Access_Control_Request_Method="POST")
            assert_refused(refused, 403, "cross_site", "web pages of other sites")
            assert "access-control-allow-origin" not in refused.headers


def test_a_star_lists_every_page(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}, cors_origins="*")
    answer = ask(address, Origin=EVIL, Sec_Fetch_Site="cross-site")
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize(
    "wrong", ["app.example", "https://app.example/", "https://a.example https://b.example", "a,*", ""]
)
def test_an_option_that_lists_no_origins_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origins: expected origins as browsers send them, such as https"):
        load_settings(cors_origins=wrong)


def test_no_origin_is_listed_by_default() -> None:
    assert ServerOptions().cors_origins is None
    assert CheckOrigin(lambda *_: None, ServerOptions())._origins._listed == frozenset()
