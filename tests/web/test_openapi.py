"""openapi.json describes every route, and every real response fits it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import requests
from jsonschema import Draft202012Validator

from server.config import ServerOptions
from server.config.paths import RESERVED
from server.web.openapi import DESCRIPTION
from server.web.origins import EXPOSED
from server.web.routes import all_routes
from tests.conftest import Serve

SD = {"shape": [1, 4, 8, 8], "dtype": "float32"}
SD_BODY = np.zeros(256, "float32").tobytes()
CLIP = {"shape": [1, 16, 1, 4, 4], "dtype": "float32", "output_type": "mp4"}

# path in the description, method, path asked, query, Accept
REAL = [
    ("/", "get", "", {}, "text/html"),
    ("/", "get", "", {}, "*/*"),
    ("/", "post", "", SD, "image/jpeg"),
    ("/", "post", "", SD, "image/png"),
    ("/", "post", "", SD, "tensor/binary"),
    ("/", "post", "", SD, "tensor/base64"),
    ("/", "post", "", {**SD, "output_type": "pt"}, "application/json"),
    ("/", "post", "", {**SD, "output_type": "pt"}, "application/octet-stream"),
    ("/", "post", "", {}, "*/*"),
    ("/predict", "post", "predict", SD, "*/*"),
    ("/invocations", "post", "invocations", SD, "*/*"),
    ("/{model}", "post", "hunyuan/", CLIP, "video/mp4"),
    ("/{model}", "post", "hunyuan", CLIP, "text/plain"),
    ("/{model}", "post", "nobody", SD, "*/*"),
    ("/encode", "post", "encode", {}, "*/*"),
    ("/{model}/encode", "post", "sd/encode", {}, "*/*"),
    ("/health", "get", "health", {}, "*/*"),
    ("/ping", "get", "ping", {}, "*/*"),
    ("/health/live", "get", "health/live", {}, "*/*"),
    ("/metrics", "get", "metrics", {}, "*/*"),
    ("/models", "get", "models", {}, "*/*"),
    ("/models", "get", "models", {"kind": "smell"}, "*/*"),
    ("/page/{file}", "get", "page/page.css", {}, "*/*"),
    ("/page/{file}", "get", "page/coffee.jpg", {}, "*/*"),
    ("/page/{file}", "get", "page/icon.svg", {}, "*/*"),
    ("/page/{file}", "get", "page/nothing", {}, "*/*"),
    ("/jobs/{id}", "get", "jobs/unknown", {}, "*/*"),
    ("/jobs/{id}", "delete", "jobs/unknown", {}, "*/*"),
    ("/jobs/{id}/result", "get", "jobs/unknown/result", {}, "*/*"),
    ("/requests/{id}/progress", "get", "requests/unknown/progress", {}, "*/*"),
    ("/openapi.json", "get", "openapi.json", {}, "*/*"),
    ("/docs", "get", "docs", {}, "text/html"),
]


def resolved(node: Any) -> Any:
    """The description with its references followed."""
    if isinstance(node, dict):
        if "$ref" in node:
            target: Any = DESCRIPTION
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            return resolved(target)
        return {key: resolved(value) for key, value in node.items()}
    return [resolved(value) for value in node] if isinstance(node, list) else copy.copy(node)


@pytest.mark.parametrize(("described", "method", "path", "query", "accept"), REAL)
def test_a_real_response_fits_its_description(
    url: str, described: str, method: str, path: str, query: dict[str, Any], accept: str
) -> None:
    headers = {"Accept": accept, "Content-Type": "tensor/binary"}
    response = requests.request(method, url + path, params=query, data=SD_BODY, headers=headers, timeout=300)
    answers = resolved(DESCRIPTION["paths"][described][method]["responses"])
    answer = answers.get(str(response.status_code), answers["default"])
    media_type = response.headers["content-type"].split(";")[0]
    assert media_type in answer["content"], response.text[:200]
    assert {"X-Request-Id"} <= {name.title() for name in response.headers}
    if "json" in media_type or media_type == "tensor/base64":
        Draft202012Validator(answer["content"][media_type]["schema"]).validate(response.json())
    if method == "post" and response.ok:
        assert [part.split(";")[0].strip() for part in response.headers["server-timing"].split(",")] == [
            "queue",
            "decode",
            "render",
        ]


def test_no_model_may_have_a_routes_name() -> None:
    words = {route.path.split("/")[1] for route in all_routes(ServerOptions())}
    assert words - {"", "{model:model}"} == RESERVED


def test_every_route_is_described() -> None:
    served = {
        (route.path.replace(":model", ""), method.lower())
        for route in all_routes(ServerOptions())
        for method in route.methods or ()
    }
    described = {
        (path, method)
        for path, item in DESCRIPTION["paths"].items()
        for method in item
        if method in ("get", "post", "delete")
    }
    assert {pair for pair in served if pair[1] != "head"} == described
    assert {row[:2] for row in REAL} == described


def test_a_named_model_takes_what_the_default_takes() -> None:
    default, named = (DESCRIPTION["paths"][path]["post"] for path in ("/", "/{model}"))
    assert default["requestBody"] == named["requestBody"]
    assert [parameter for parameter in default["parameters"] if parameter["name"] != "model"] == named["parameters"]
    sent = {parameter["name"] for parameter in default["parameters"]}
    assert {
        "shape",
        "dtype",
        "scaling_factor",
        "shift_factor",
        "do_scaling",
        "output_type",
        "height",
        "quality",
    } <= sent


def test_the_server_serves_it(url: str) -> None:
    assert requests.get(url + "openapi.json", timeout=300).json() == DESCRIPTION


def test_an_id_is_kept_when_it_is_safe_to_echo(url: str) -> None:
    for sent, is_kept in [("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("é", False)]:
        found = requests.get(url + "health", headers={"X-Request-Id": sent.encode()}, timeout=300).headers[
            "x-request-id"
        ]
        assert (found == sent) is is_kept


def test_every_operation_has_a_name_of_its_own_for_generated_clients() -> None:
    operations = [
        operation
        for item in DESCRIPTION["paths"].values()
        for method, operation in item.items()
        if method in ("get", "post", "delete")
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scheme", ["bearer", "basic", "key"])
def test_every_way_to_send_a_key_is_described_and_works(serve: Serve, scheme: str) -> None:
    assert {scheme: []} in DESCRIPTION["security"]
    described = DESCRIPTION["components"]["securitySchemes"][scheme]
    url = serve({"demo": {"repo": "embedded"}}, api_key="secret")
    if described["type"] == "apiKey":
        sent: dict[str, Any] = {"headers": {described["name"]: "secret"}}
    elif described["scheme"] == "basic":
        sent = {"auth": ("anyone", "secret")}
    else:
        sent = {"headers": {"Authorization": "Bearer secret"}}
    assert requests.get(f"{url}models", timeout=300).status_code == 401
    assert requests.get(f"{url}models", **sent, timeout=300).status_code == 200
    for path, item in DESCRIPTION["paths"].items():
        if item.get("get", {}).get("security") == []:
            assert requests.get(url + path[1:], timeout=300).status_code == 200


def test_every_header_of_the_contract_is_described() -> None:
    text = json.dumps(DESCRIPTION)
    for name in EXPOSED.split(", "):
        assert f'"{name}": {{' in text, f"{name} of an answer"
    for path in ("/", "/encode"):
        parameters = [resolved(each) for each in DESCRIPTION["paths"][path]["post"]["parameters"]]
        sent = {each["name"] for each in parameters if each["in"] == "header"}
        assert sent == {"X-Request-Id", "X-Request-Timeout", "Prefer", "Idempotency-Key"}
