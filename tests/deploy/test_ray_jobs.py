"""What a front on Ray checks before it passes a request on to the process that has the jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import requests
from starlette.middleware import Middleware

from server.web import app as web_app
from tests import conftest
from tests.conftest import Serve
from tests.vaes import LocalVae

exceptions = pytest.importorskip("ray.exceptions", reason="needs deploy/ray-requirements.txt")
pytest.importorskip("ray.serve.schema", reason="needs deploy/ray-requirements.txt")
from deploy.ray_jobs import Answered, Asked, ToJobs  # noqa: E402  # once Ray is known to be there

JOB = {"Prefer": "respond-async"}
LIMIT_MB = 1
KEY = "a-secret-of-16-chars"


class Handle:
    """Takes the place of Ray's handle of the process with the jobs. is_dead: that process has ended."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.is_dead = False
        self.answer = self

    async def remote(self, message: bytes) -> bytes:
        await asyncio.sleep(0)
        if self.is_dead:
            raise exceptions.ActorDiedError
        self.asked.append(msgspec.msgpack.decode(message, type=Asked))
        return msgspec.msgpack.encode(Answered(202, [(b"location", b"/jobs/1")], b"{}"))


@pytest.fixture
def handle() -> Handle:
    return Handle()


@pytest.fixture
def url(handle: Handle, serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch) -> str:
    def create_app(*arguments: Any) -> Any:
        app = web_app.create_app(*arguments)
        app.user_middleware.append(Middleware(ToJobs, jobs=handle))
        return app

    monkeypatch.setattr(conftest, "create_app", create_app)
    models = {"sd": {"repo": str(vaes["sd"].folder)}}
    return serve(models, max_body_mb=LIMIT_MB, api_key=KEY)


def test_a_request_for_a_job_is_passed_on_with_its_id(handle: Handle, url: str) -> None:
    headers = {**JOB, "X-API-Key": KEY}
    answer = requests.post(url + "sd/", b"latents", params={"dtype": "float16"}, headers=headers, timeout=300)
    assert (answer.status_code, answer.headers["location"]) == (202, "/jobs/1")
    (asked,) = handle.asked
    assert asked.body == b"latents"
    assert (asked.about["path"], bytes(asked.about["query_string"])) == ("/sd", b"dtype=float16")
    sent = {bytes(name): bytes(value) for name, value in asked.about["headers"]}
    assert sent[b"x-request-id"].decode() == answer.headers["x-request-id"]
    assert requests.get(url + "jobs/1", headers={"X-API-Key": KEY}, timeout=300).status_code == 202
    assert handle.asked[1].about["method"] == "GET"


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_without_a_key_nothing_is_passed_on(handle: Handle, url: str, method: str) -> None:
    path = "sd" if method == "POST" else "jobs/1"
    answer = requests.request(method, url + path, data=b"latents", headers=JOB, timeout=300)
    assert answer.status_code == 401
    assert handle.asked == []


def test_a_body_in_chunks_is_limited(handle: Handle, url: str) -> None:
    body = (bytes(1 << 16) for _ in range(1000))
    answer = requests.post(url + "sd", data=body, headers={**JOB, "X-API-Key": KEY}, timeout=300)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert handle.asked == []


def test_a_declared_length_is_limited(handle: Handle, url: str) -> None:
    answer = requests.post(url + "sd", bytes((LIMIT_MB << 20) + 1), headers={**JOB, "X-API-Key": KEY}, timeout=300)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert handle.asked == []


def test_where_the_process_with_the_jobs_ended_the_client_is_told(handle: Handle, url: str) -> None:
    handle.is_dead = True
    answer = requests.get(url + "jobs/1", headers={"X-API-Key": KEY}, timeout=300)
    assert answer.status_code == 503
    assert "the process that has the jobs ended" in answer.json()["error"]
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
