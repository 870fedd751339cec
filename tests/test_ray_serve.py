"""The server on Ray Serve: a real local Ray with two CPU replicas, its real HTTP proxy, and processes that are killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.conftest import REPOSITORY
from tests.contract.__main__ import CASES, Case
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until
from tests.web.test_errors import assert_refused

serve_schema = pytest.importorskip("ray.serve.schema", reason="needs deploy/ray-requirements.txt")
from ray.serve.config import AutoscalingConfig  # noqa: E402  # once Ray is known to be there

from deploy.ray_serve import Arguments  # noqa: E402  # likewise

pytestmark = pytest.mark.slow

SHIPPED = REPOSITORY / "deploy" / "ray_serve.yaml"
PAGE = REPOSITORY / "deploy" / "ray.md"
CONTAINED = REPOSITORY / "tests" / "contained.py"
PICTURE = {"shape": "1,4,32,32", "dtype": "float16"}
LATENTS = bytes(2 * 4 * 32 * 32)

HANG_S = 5  # a decode of 2048x2048 takes longer

Vaes = dict[str, LocalVae]


@dataclass
class Cluster:
    """`serve run` and all that it started."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def pids(self, deployment: str) -> list[int]:
        """Of a deployment's replicas."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if f"ServeReplica:vae:{deployment}" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def kill(self, deployment: str) -> None:
        """One of its replicas, the way the kernel does it."""
        os.kill(self.pids(deployment)[0], signal.SIGKILL)

    def wait_for(self, deployment: str, count: int) -> None:
        until(lambda: len(self.pids(deployment)) == count, f"{count} replicas of {deployment}")

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.split("/")[2].split(":")
        return host, int(port)

    def head_of(self, side: int) -> bytes:
        """The head of a decode of float16 latents of side x side."""
        size = f"shape=1,4,{side},{side}&dtype=float16"
        lines = f"POST /demo?{size} HTTP/1.1", "Host: localhost", f"Content-Length: {2 * 4 * side * side}"
        return "\r\n".join([*lines, "", ""]).encode()

    def decode(self, model: str = "demo", **params: str) -> requests.Response:
        return requests.post(self.url + model, LATENTS, params=PICTURE | params, timeout=300)

    def metric(self, name: str) -> float:
        """Of all its labels."""
        told = requests.get(self.url + "metrics", timeout=300).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in told.splitlines() if line.split("{")[0].split(" ")[0] == name
        )

    def statuses(self, count: int, at_once: int) -> Counter[int]:
        with ThreadPoolExecutor(at_once) as clients:
            return Counter(answer.status_code for answer in clients.map(lambda _: self.decode(), range(count)))


@contextmanager
def launched(folder: Path, port: int, *arguments: str | Path) -> Iterator[Cluster]:
    """A Ray of its own, with the variables that ray.md says to set."""
    told = dict(re.findall(r"^export (\w+)=(.+)$", PAGE.read_text(), re.MULTILINE))
    environment = {**os.environ, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", **told}
    command = [sys.executable, CONTAINED, Path(sys.executable).with_name("serve"), "run", *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield Cluster(f"http://127.0.0.1:{port}/", process, folder / "log")
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)
    finally:
        assert process.stdin
        process.stdin.close()  # a cluster that still runs, after a failure say, is ended with all its processes
        process.wait()


@contextmanager
def cluster(folder: Path, config: dict[str, Any]) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    with launched(folder, port, folder / "serve.yaml") as running:
        yield running


def config_of(models: Path, **options: Any) -> dict[str, Any]:
    """The shipped one, for two processors and no GPU; options: of the replicas' deployment."""
    config = yaml.safe_load(SHIPPED.read_text())
    (app,) = config["applications"]
    app["args"]["config"] = str(models)
    for deployment in app["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.5}
    app["deployments"][1] |= options
    return config


@pytest.fixture(scope="module")
def models(models_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contract's VAEs, and the demo, whose pictures take some time."""
    written = yaml.safe_load(models_yaml.read_text())
    for entry in written["models"].values():
        entry["repo"] = str((models_yaml.parent / entry["repo"]).resolve())
    written["models"]["demo"] = {"repo": str(REPOSITORY / "server" / "demo"), "preload": True}
    path = tmp_path_factory.mktemp("models") / "models.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def until_ready(running: Cluster) -> list[str]:
    """All that /health says until it is 200."""
    seen: list[str] = []

    def is_ready() -> bool:
        assert running.process.poll() is None, running.log.read_text()
        with suppress(requests.ConnectionError):
            answer = requests.get(running.url + "health", timeout=300)
            seen.append(answer.json().get("error", "ready"))
            assert answer.status_code == (200 if seen[-1] == "ready" else 503)
        return "ready" in seen

    until(is_ready, "ready")
    return seen


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = config_of(models, num_replicas=2)
    config["applications"][0]["args"]["models_per_replica"] = 30
    config["applications"][0]["runtime_env"]["env_vars"]["VAE_SERVER_HANG_TIMEOUT_S"] = str(HANG_S)
    del config["applications"][0]["deployments"][1]["autoscaling_config"]
    with cluster(tmp_path_factory.mktemp("pair"), config) as running:
        assert any("still loading" in said for said in until_ready(running)), "a front is ready after its replicas"
        running.wait_for("VAE", 2)
        yield running


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_case_of_the_contract(case: Case, pair: Cluster, vaes: Vaes) -> None:
    case.run(pair.url, vaes)


def test_one_request_id_and_it_is_the_clients(pair: Cluster) -> None:
    answer = requests.get(pair.url + "health", headers={"X-Request-Id": "mine-1"}, timeout=300)
    assert answer.headers["x-request-id"] == "mine-1"
    invented = requests.get(pair.url + "health", headers={"X-Request-Id": "<b>"}, timeout=300).headers["x-request-id"]
    assert len(invented) == 16


def test_errors_are_the_servers_own(pair: Cluster) -> None:
    assert_refused(requests.post(pair.url + "nobody", LATENTS, timeout=300), 404, "unknown_model", "known models")
    assert_refused(requests.post(pair.url, LATENTS[:-1], params=PICTURE, timeout=300), 400, "wrong_length", "bytes")
    assert_refused(requests.get(pair.url + "no/such", timeout=300), 404, "not_found", "route")


def test_each_replica_holds_its_models_and_tells(pair: Cluster) -> None:
    def demo() -> tuple[str, str | None]:
        pair.statuses(2, 2)  # replicas tell with their answers
        listed = {model["name"]: model for model in requests.get(pair.url + "models", timeout=300).json()["models"]}
        return listed["demo"]["state"], listed["demo"].get("device")

    until(lambda: demo() == ("loaded", "cpu, cpu"), "both replicas preload the demo")


@pytest.mark.parametrize("deployment", ["VAE", "Front"])
def test_nothing_is_lost_when_a_replica_is_killed_under_load(deployment: str, pair: Cluster) -> None:
    count = len(pair.pids(deployment))
    with ThreadPoolExecutor(1) as clients:
        answered = clients.submit(pair.statuses, 60, 8)
        until(lambda: pair.metric("vae_inflight") > 1, "both replicas are at work")
        pair.kill(deployment)
        assert not answered.done()
        assert answered.result(300) == {200: 60}
    if deployment == "VAE":
        assert "while it had a request" in pair.log.read_text()
    pair.wait_for(deployment, count)


def test_slow_work_that_makes_progress_is_done_and_nobody_else_waits_for_it(pair: Cluster) -> None:
    """It takes several times `hang_timeout_s`, which counts from the last step of the work."""
    slow = PICTURE | {"shape": "1,4,256,256"}
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(requests.post, pair.url + "demo", bytes(2 * 4 * 256 * 256), params=slow, timeout=300)
        others: Counter[int] = Counter()
        until(lambda: pair.metric("vae_inflight") == 1, "the front hears that a replica began")
        while not answer.done():
            others += pair.statuses(4, 4)
    assert set(others) == {200}
    assert answer.result().status_code == 200


def test_a_client_that_leaves_takes_its_request_along(pair: Cluster) -> None:
    before = pair.metric("vae_cancelled_total")
    with socket.create_connection(pair.address) as client:
        client.sendall(pair.head_of(160) + bytes(2 * 4 * 160 * 160))
        until(lambda: pair.metric("vae_inflight") == 1, "it is in work")
    until(lambda: pair.metric("vae_cancelled_total") == before + 1, "the front heard of it")


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_the_servers(pair: Cluster) -> None:
    def answered(*codes: str) -> float:
        told = requests.get(pair.url + "metrics", timeout=300).text.splitlines()
        lines = [
            line
            for line in told
            if line.startswith("vae_requests_total") and any(f'"{code}"' in line for code in codes)
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    faults, left = answered("500", "503"), answered("499")
    for _ in range(5):
        with socket.create_connection(pair.address) as client:
            client.sendall(pair.head_of(64) + bytes(1000))
            time.sleep(0.2)
    until(lambda: answered("499") == left + 5, "all five are counted")
    assert answered("500", "503") == faults


def test_one_deadline_holds_over_a_fronts_end(pair: Cluster) -> None:
    asked = {"params": PICTURE | {"shape": "1,4,160,160"}, "headers": {"X-Request-Timeout": "3"}}
    with ThreadPoolExecutor(1) as clients:
        for _ in range(20):  # on a busy machine the deadline may pass before the front can be ended
            answer = clients.submit(requests.post, pair.url + "demo", bytes(2 * 4 * 160 * 160), timeout=300, **asked)
            until(lambda: pair.metric("vae_inflight") == 1 or answer.done(), "it is in work")  # noqa: B023  # used up within the turn
            if not answer.done():
                break
        pair.kill("Front")
        told = answer.result()
    assert_refused(told, 504, "deadline_passed", "not done")
    assert " 3 s" not in told.json()["error"], "the next front gave it the whole time again"
    until_ready(pair)


def test_replicas_that_do_not_start_are_told(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "models.yaml").write_text("models: {broken: {repo: ./broken, preload: true}}")
    with cluster(tmp_path, config_of(tmp_path / "models.yaml")) as running:

        def said() -> str:
            with suppress(requests.ConnectionError):
                return str(requests.get(running.url + "health", timeout=300).json()["error"])
            return ""

        until(lambda: "did not load" in said(), "the front has given up")


@pytest.fixture(scope="module")
def scaling(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One replica or two, of a model each, with room for few requests."""
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    config = config_of(models, max_ongoing_requests=2, max_queued_requests=4, autoscaling_config=autoscaling)
    config["applications"][0]["args"]["models_per_replica"] = 1
    with cluster(tmp_path_factory.mktemp("scaling"), config) as running:
        until_ready(running)
        yield running


def test_a_replica_holds_no_more_models_than_it_may(scaling: Cluster) -> None:
    def asked(model: str) -> int:
        params = PICTURE | {"shape": "1,4,4,4"}
        answer = requests.post(scaling.url + model, bytes(2 * 4 * 4 * 4), params=params, timeout=300)
        assert answer.status_code in (200, 429), answer.text
        return answer.status_code

    def loaded() -> list[str]:
        listed = requests.get(scaling.url + "models", timeout=300).json()["models"]
        return [model["name"] for model in listed if model["state"] == "loaded"]

    scaling.wait_for("VAE", 1)
    with ThreadPoolExecutor(4) as clients:
        assert 200 in set(clients.map(asked, ["demo", "sd", "demo", "sd"] * 3))
    assert asked("demo") == 200
    assert loaded() == ["demo"]


def test_what_ray_has_no_room_for_is_told_to_come_again(scaling: Cluster) -> None:
    scaling.wait_for("VAE", 1)
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: scaling.decode(), range(12)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert_refused(refused, 429, "queue_full", "backpressure")
    assert int(refused.headers["Retry-After"]) >= 1


def test_queued_requests_bring_a_second_replica_and_it_leaves_with_them(scaling: Cluster) -> None:
    answered: Counter[int] = Counter()

    def replicas_after(count: int, at_once: int) -> int:
        answered.update(scaling.statuses(count, at_once))
        return len(scaling.pids("VAE"))

    until(lambda: replicas_after(8, 4) == 2, "a second replica")
    answered += scaling.statuses(16, 4)
    until(lambda: replicas_after(1, 1) == 1, "the second replica's end")
    assert set(answered) == {200}


@pytest.fixture(scope="module")
def fronts(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two fronts, between which the requests of one client are divided."""
    config = config_of(models, num_replicas=1)
    config["applications"][0]["deployments"][0]["num_replicas"] = 2
    del config["applications"][0]["deployments"][1]["autoscaling_config"]
    with cluster(tmp_path_factory.mktemp("fronts"), config) as running:
        until_ready(running)
        running.wait_for("Front", 2)
        yield running


def job_of(running: Cluster, key: str, **params: str) -> str:
    """Start a job, or find it by its key, and return its address."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": key, "X-Request-Id": "mine"}
    answer = requests.post(running.url + "demo", LATENTS, params=PICTURE | params, headers=headers, timeout=300)
    assert (answer.status_code, answer.headers["x-request-id"]) == (202, "mine"), answer.text
    return running.url.rstrip("/") + answer.headers["location"]


def test_a_job_is_found_through_every_front(fronts: Cluster) -> None:
    jobs = {job_of(fronts, "a", image_format="png") for _ in range(12)}
    assert len(jobs) == 1, "a key names one job, whichever front the request reached"
    (job,) = jobs
    until(lambda: requests.get(job, timeout=300).json()["state"] == "done", "the end of the job")
    expected = fronts.decode(image_format="png").content
    for _ in range(12):
        answer = requests.get(job + "/result", timeout=300)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert answer.content == expected
    assert requests.delete(job, timeout=300).status_code == 204
    for _ in range(12):
        assert_refused(requests.get(job, timeout=300), 404, "not_found", "no such job")


def test_what_is_refused_on_the_way_to_a_job_is_refused_as_usual(fronts: Cluster) -> None:
    headers = {"Prefer": "respond-async"}
    wrong = requests.post(fronts.url + "demo", LATENTS[1:], params=PICTURE, headers=headers, timeout=300)
    assert_refused(wrong, 400, "wrong_length", "bytes")
    large = requests.post(fronts.url + "demo", bytes(129 << 20), headers=headers, timeout=300)
    assert_refused(large, 413, "too_large", "send less data")


def test_a_job_outlives_the_fronts_and_not_the_process_that_has_it(fronts: Cluster) -> None:
    job = job_of(fronts, "b")
    before = fronts.pids("Front")
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(fronts.pids("Front")) - set(before)) == 2, "two other fronts")
    until_ready(fronts)

    def answer() -> requests.Response:
        return requests.get(job + "/result", timeout=300)

    until(lambda: answer().status_code == 200, "the answer of the job")
    (old,) = fronts.pids("Jobs")
    os.kill(old, signal.SIGKILL)
    until(lambda: answer().status_code == 404, "another process for jobs")
    assert_refused(answer(), 404, "not_found", "send the request again")
    again = job_of(fronts, "b")
    assert again != job
    until(lambda: requests.get(again + "/result", timeout=300).status_code == 200, "the answer of the other job")


def test_the_shipped_config_is_one_that_ray_takes() -> None:
    shipped = yaml.safe_load(SHIPPED.read_text())
    serve_schema.ServeDeploySchema.model_validate(shipped)
    (app,) = shipped["applications"]
    assert [deployment["name"] for deployment in app["deployments"]] == ["Front", "VAE"]
    # Ray takes keys that it does not know, and says nothing.
    for deployment in app["deployments"]:
        assert deployment.keys() <= serve_schema.DeploymentSchema.model_fields.keys()
    assert app["deployments"][1]["autoscaling_config"].keys() <= AutoscalingConfig.model_fields.keys()
    assert Arguments(**app["args"]).models_per_replica == 4


def test_the_pages_first_command_serves_the_demo(tmp_path: Path) -> None:
    first, shipped = re.findall(r"^serve run (\S+)$", PAGE.read_text(), re.MULTILINE)
    assert REPOSITORY / shipped == SHIPPED
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000, Ray's own, is taken")
    with launched(tmp_path, 8000, first) as running:
        until_ready(running)
        assert running.decode().status_code == 200
