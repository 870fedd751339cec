"""The compose folder's Prometheus configuration in a real Prometheus, which scrapes a real server. `make prometheus`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.deploy.test_monitoring import COMPOSE, DASHBOARD
from tests.load import Ask, all_of, process
from tests.vaes import LocalVae, write_entries
from tests.waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: make prometheus"),
]
QUICK = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}


@dataclass
class Scraped:
    """A server and the Prometheus that scrapes it."""

    url: str
    prometheus: str
    server: int

    def get(self, path: str, **params: str) -> Any:
        told = requests.get(f"{self.prometheus}/api/v1/{path}", params=params, timeout=300).json()
        assert told["status"] == "success", told
        return told["data"]

    def worker(self) -> int:
        (child,) = [child for child in psutil.Process(self.server).children(recursive=True) if is_worker(child)]
        return child.pid


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return len(process.parents()) > 1 and not process.children() and "forkserver" in " ".join(process.cmdline())
    return False


@pytest.fixture(scope="module")
def scraped(vaes: dict[str, LocalVae], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("prometheus")
    with process(write_entries(vaes["sd"].folder.parent)) as (url, server):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        running = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={quick_config(folder, url)}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stderr=subprocess.DEVNULL,
        )
        found = Scraped(url, f"http://{address}", server.pid)
        try:
            until(lambda: is_ready(found))
            yield found
        finally:
            running.terminate()
            running.wait(PATIENCE_S)


def quick_config(folder: Path, url: str) -> Path:
    """The shipped one, with this machine's paths and address, and less patience."""
    config = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())
    config["global"] = QUICK
    config["rule_files"] = [str(COMPOSE / Path(path).name) for path in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [url.split("/")[2]]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yaml"


def is_ready(found: Scraped) -> bool:
    with suppress(requests.RequestException):
        return any(target["health"] == "up" for target in found.get("targets")["activeTargets"])
    return False


def test_the_rules_are_loaded_and_evaluate(scraped: Scraped) -> None:
    def health() -> set[str]:
        return {rule["health"] for group in scraped.get("rules")["groups"] for rule in group["rules"]}

    until(lambda: health() == {"ok"})


def test_the_dashboard_has_numbers_once_pictures_were_asked_for(scraped: Scraped) -> None:
    def empty() -> set[str]:
        asked = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
        shown = {title for title, expression in asked if values(scraped, expression)}
        return {title for title, _ in asked} - shown

    asks = [Ask.of((1, 4, 8, 8))] * 3
    for _ in range(5):
        assert all(told.status == 200 for told in all_of(scraped.url, asks, 1))
        time.sleep(0.3)
    until(lambda: empty() <= {"Refusals a second, by reason", "Restarts, lack of memory, overflows"})


def values(scraped: Scraped, expression: str) -> list[Any]:
    expression = expression.replace("$__rate_interval", "10s").replace("$__interval", "10s")
    found = scraped.get("query", query=expression)["result"]
    assert isinstance(found, list)
    return found


def test_a_worker_that_ends_again_and_again_fires_its_alert(scraped: Scraped) -> None:
    for _ in range(5):
        before = scraped.worker()
        os.kill(before, signal.SIGKILL)
        until(lambda before=before: no_longer(scraped, before))
        time.sleep(0.5)

    def firing() -> list[str]:
        alerts = scraped.get("alerts")["alerts"]
        return [alert["annotations"]["summary"] for alert in alerts if alert["state"] == "firing"]

    until(lambda: any("a worker of 127.0.0.1" in summary for summary in firing()))


def no_longer(scraped: Scraped, pid: int) -> bool:
    """Whether another worker is there."""
    with suppress(ValueError):
        return scraped.worker() != pid
    return False
