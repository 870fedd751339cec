"""`Prefer: respond-async`: a request becomes a job, which is watched, fetched, cancelled and forgotten."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from jsonschema import Draft202012Validator

from server.engine import runner
from server.web import jobs
from server.web.openapi import DESCRIPTION
from tests.conftest import Serve, write_models_yaml
from tests.load import process
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def url(serve: Serve, vaes: dict[str, LocalVae]) -> str:
    return serve({name: {"repo": str(vaes[name].folder)} for name in ("sd", "hunyuan")})


def post(url: str, headers: Any = ASYNC, side: int = 8, **query: Any) -> requests.Response:
    latents = np.random.default_rng(side).normal(size=(1, 4, side, side)).astype("float32")
    sent = {"shape": latents.shape, "dtype": "float32", "image_format": "png", **query}
    return requests.post(url, latents.tobytes(), params=sent, headers=headers, timeout=PATIENCE_S)


def get(url: str, path: str) -> requests.Response:
    return requests.get(url.rstrip("/") + path, timeout=PATIENCE_S)


def state_of(url: str, answer: requests.Response) -> str:
    state: str = get(url, answer.headers["location"]).json()["state"]
    return state


def result_of(url: str, answer: requests.Response) -> requests.Response:
    until(lambda: state_of(url, answer) not in ("queued", "running"), "the end of the job")
    return get(url, answer.headers["location"] + "/result")


def test_a_job_has_the_answer_that_the_request_would_have_got(url: str) -> None:
    waited, answer = post(url, None), post(url)
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    result = result_of(url, answer)
    assert (result.status_code, result.headers["content-type"]) == (200, "image/png")
    assert result.content == waited.content
    known = get(url, answer.headers["location"]).json()
    assert (known["state"], known["progress"], known["size_bytes"]) == ("done", 1.0, len(result.content))
    assert "vae_jobs 1.0" in get(url, "/metrics").text
    assert get(url, answer.headers["location"] + "/result").content == waited.content, "it can be fetched again"


def test_a_job_that_waits_tells_its_place_and_is_not_done(url: str, held_device: threading.Event) -> None:
    answers = [post(url, side=side) for side in (8, 16, 24)]
    until(lambda: state_of(url, answers[0]) == "running", "the first job")
    last = get(url, answers[2].headers["location"]).json()
    assert (last["state"], last["position"], last["progress"]) == ("queued", 1, 0.0)
    assert last["seconds_left"] > 0
    early = get(url, answers[2].headers["location"] + "/result")
    assert (early.status_code, early.json()["code"], early.headers["retry-after"]) == (409, "not_done", "1")
    held_device.set()
    assert all(result_of(url, answer).ok for answer in answers)


def test_a_video_tells_the_frames_that_are_done(
    url: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    latents = vaes["hunyuan"].latents(5, 4, 6)
    sent = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4"}
    ask = {"params": sent, "data": latents.numpy().tobytes(), "timeout": PATIENCE_S}
    answer = requests.post(url + "hunyuan", headers=ASYNC, **ask)  # type: ignore[arg-type]  # one dict of mixed arguments
    until(lambda: get(url, answer.headers["location"]).json()["progress"] >= 9 / 17, "nine frames")
    assert get(url, answer.headers["location"]).json()["progress"] < 1
    held_video.set()
    assert result_of(url, answer).content[4:8] == b"ftyp"
    streamed = requests.post(url + "hunyuan", headers=ASYNC, **{**ask, "params": {**sent, "stream": True}})  # type: ignore[arg-type]  # one dict of mixed arguments
    assert result_of(url, streamed).content.count(b"moof") == 17, "a job's answer is whole"


def test_the_progress_of_a_request_that_a_client_waits_for(url: str, held_device: threading.Event) -> None:
    thread = threading.Thread(target=post, args=(url, {"X-Request-Id": "mine"}))
    thread.start()
    until(lambda: get(url, "/requests/mine/progress").ok, "the request")
    assert get(url, "/requests/mine/progress").json()["state"] in ("queued", "running")
    held_device.set()
    thread.join(PATIENCE_S)
    assert get(url, "/requests/mine/progress").status_code == 404


def test_a_job_that_is_deleted_is_cancelled_and_forgotten(url: str, held_device: threading.Event) -> None:
    first, second = post(url), post(url, side=16)
    place = url.rstrip("/") + second.headers["location"]
    assert requests.delete(place, timeout=PATIENCE_S).status_code == 204
    gone = requests.get(place, timeout=PATIENCE_S)
    assert gone.status_code == 404
    assert "the server was restarted" in gone.json()["error"]
    assert requests.delete(place, timeout=PATIENCE_S).status_code == 404
    held_device.set()
    assert result_of(url, first).ok
    until(lambda: "vae_jobs 1.0" in get(url, "/metrics").text, "the end of the second job")


def test_an_idempotency_key_names_the_same_job(url: str) -> None:
    headers = {**ASYNC, "Idempotency-Key": "a"}
    first, again, other = post(url, headers), post(url, headers), post(url, {**ASYNC, "Idempotency-Key": "b"})
    assert first.headers["location"] == again.headers["location"] != other.headers["location"]
    conflict = post(url, headers, side=16)
    assert (conflict.status_code, conflict.json()["code"]) == (409, "idempotency_conflict")
    for body in (bytes(4 * 256), iter([bytes(4 * 256)])):  # as many bytes, with and without a Content-Length
        params = {"shape": [1, 4, 8, 8], "dtype": "float32"}
        conflict = requests.post(url, data=body, params=params, headers=headers, timeout=PATIENCE_S)
        assert (conflict.status_code, conflict.json()["code"]) == (409, "idempotency_conflict")


def test_jobs_with_one_request_id_have_their_own_progress(url: str, held_device: threading.Event) -> None:
    headers = {**ASYNC, "X-Request-Id": "same"}
    answers = [post(url, headers, side=side) for side in (8, 16)]
    until(lambda: state_of(url, answers[0]) == "running", "the first job")
    assert state_of(url, answers[1]) == "queued"
    held_device.set()
    assert all(result_of(url, answer).ok for answer in answers)


def test_an_answer_that_nobody_has_fetched_is_not_dropped_for_another_job(
    serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_jobs=1)
    first = post(url)
    until(lambda: state_of(url, first) == "done", "the first job")
    full = post(url, side=16)
    assert (full.status_code, full.json()["code"]) == (429, "queue_full")
    assert result_of(url, first).ok
    second = post(url, side=16)
    assert second.status_code == 202
    assert get(url, first.headers["location"]).status_code == 404
    until(lambda: state_of(url, second) == "done", "the second job")
    monkeypatch.setattr(jobs, "UNFETCHED_S", 0.0)
    assert post(url, side=24).status_code == 202


def test_every_state_is_as_the_description_says(url: str, held_device: threading.Event) -> None:
    def fits(name: str, body: Any) -> None:
        schema = {**DESCRIPTION["components"]["schemas"][name], "components": DESCRIPTION["components"]}
        Draft202012Validator(schema).validate(body)

    answers = [post(url), post(url, {**ASYNC, "X-Request-Id": "second"}, side=16)]
    for answer in answers:
        fits("Job", answer.json())
        fits("Job", get(url, answer.headers["location"]).json())
    fits("Progress", get(url, "/requests/second/progress").json())
    held_device.set()
    for answer in answers:
        assert result_of(url, answer).ok
        fits("Job", get(url, answer.headers["location"]).json())


def test_what_is_refused_is_no_job(url: str) -> None:
    answer = post(url, dtype="int8")
    assert answer.status_code == 400
    assert "vae_jobs 0.0" in get(url, "/metrics").text


def test_a_job_that_fails_has_the_error_of_the_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(runner.Runner, "_compute", fails)
    answer = post(url)
    result = result_of(url, answer)
    assert result.status_code == 500
    known = get(url, answer.headers["location"]).json()
    assert (known["state"], known["code"]) == ("failed", result.json()["code"])


def test_jobs_are_bounded_in_number_bytes_and_age(
    serve: Serve, vaes: dict[str, LocalVae], held_device: threading.Event
) -> None:
    url = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_jobs=2, job_ttl_s=1000, job_results_mb=1)
    first, second = post(url), post(url, side=16)
    full = post(url)
    assert (full.status_code, full.json()["code"]) == (429, "queue_full")
    held_device.set()
    assert result_of(url, first).ok
    assert result_of(url, second).ok
    third = post(url, output_type="pt", side=64)  # 3 MiB: more than all answers together may have
    assert result_of(url, third).ok, "the newest answer stays"
    assert [get(url, answer.headers["location"]).status_code for answer in (first, second)] == [404, 404]


def test_an_answer_expires(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    url = serve({"sd": {"repo": str(vaes["sd"].folder)}}, job_ttl_s=0.5)
    answer = post(url)
    until(lambda: get(url, answer.headers["location"]).status_code == 404, "the end of the job")


def test_a_server_that_ends_waits_for_its_jobs(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    config = write_models_yaml(tmp_path / "models.yaml", {"sd": {"repo": str(vaes["sd"].folder)}}, "sd")
    with process(config) as (url, server):
        assert post(url).status_code == 202
        began = time.monotonic()
        server.terminate()
        assert server.wait(PATIENCE_S) == 0
        assert time.monotonic() - began < PATIENCE_S
