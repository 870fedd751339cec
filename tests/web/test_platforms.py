"""What Vertex AI and SageMaker ask of a container: their routes, which carry no query string."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import requests

from tests.conftest import Serve
from tests.vaes import LocalVae
from tests.web.test_errors import assert_refused
from tests.web.test_hosts import status_of

HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/9", "/v1/endpoints/7/deployedModels/9:predict"


@pytest.fixture
def vertex(serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address, without the slash at the end; with a key."""
    monkeypatch.setenv("AIP_HEALTH_ROUTE", HEALTH)
    monkeypatch.setenv("AIP_PREDICT_ROUTE", PREDICT)
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    return serve({"sd": {"repo": str(vaes["sd"].folder)}}).rstrip("/")


def body(vae: LocalVae, **parameters: Any) -> dict[str, Any]:
    latents = vae.latents(8, 8).numpy().tobytes()
    parameters = {"shape": [1, 4, 8, 8], "dtype": "float32", **parameters}
    return {"inputs": base64.b64encode(latents).decode(), "parameters": parameters}


def test_vertex_finds_its_routes_beside_ours(vertex: str, vaes: dict[str, LocalVae]) -> None:
    sent, key = body(vaes["sd"], image_format="png"), {"X-API-Key": "secret"}
    pictures = [requests.post(vertex + path, json=sent, headers=key, timeout=300).content for path in (PREDICT, "/")]
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]


def test_only_the_probe_of_a_named_route_needs_no_key(vertex: str, vaes: dict[str, LocalVae]) -> None:
    for path in (HEALTH, f"{HEALTH}/", "/ping"):
        assert requests.get(vertex + path, timeout=300).json() == {"status": "ready"}
        assert_refused(requests.post(vertex + path, json={}, timeout=300), 401, "unauthorized", "a key is required")
    assert_refused(requests.post(vertex + PREDICT, json=body(vaes["sd"]), timeout=300), 401, "unauthorized", "a key")


def test_a_probe_of_a_named_route_may_come_by_address(vertex: str) -> None:
    assert status_of(vertex + "/", "Host: 10.1.2.3:8080", target=HEALTH) == 200
    assert status_of(vertex + "/", "Host: 10.1.2.3:8080", target=PREDICT) == 421


def test_the_root_may_be_the_health_route_and_still_wants_a_key_to_decode(
    serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, health_route="/")
    assert requests.get(address, timeout=300).json() == {"status": "ready"}
    assert_refused(requests.post(address, json=body(vaes["sd"]), timeout=300), 401, "unauthorized", "a key is required")


def test_sagemaker_names_the_model_in_the_body(url: str, vaes: dict[str, LocalVae]) -> None:
    for name in ("sd", "sdxl"):
        sent = body(vaes[name], model=name, output_type="pt")
        tensors = [requests.post(url + path, json=sent, timeout=300).content for path in ("invocations", name)]
        assert len(tensors[0]) == 3 * 64 * 64 * 4
        assert tensors[0] == tensors[1]


def test_what_sagemaker_sends_wrongly_is_told_in_json(url: str) -> None:
    answer = requests.post(url + "invocations", data=b"abc", headers={"Content-Type": "application/json"}, timeout=300)
    assert_refused(answer, 400, "bad_request", "the body is not JSON")
    assert_refused(requests.get(url + "invocations", timeout=300), 405, "method_not_allowed", "")


def test_ping_is_503_until_a_model_can_serve(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"lost": {"repo": "./lost", "preload": True}})
    assert_refused(requests.get(address + "ping", timeout=300), 503, "unavailable", "")
