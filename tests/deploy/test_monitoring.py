"""Every metric and every PromQL expression of the dashboard and the alerts, against what the server exports."""

from __future__ import annotations

import json
import re
from typing import Any

import promql_parser
import pytest
import yaml

from server.config import ServerOptions
from server.metrics import Metrics
from tests.conftest import REPOSITORY

COMPOSE = REPOSITORY / "deploy" / "compose"
DASHBOARD: dict[str, Any] = json.loads((COMPOSE / "grafana" / "vae-server.json").read_text())
ALERTS = [rule for group in yaml.safe_load((COMPOSE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = {
    **{f"{panel['title']} {target['refId']}": target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]},
    **{rule["alert"]: rule["expr"] for rule in ALERTS},
}  # fmt: skip
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def exported() -> dict[str, set[str]]:
    """The names of samples, and their labels."""
    collectors = Metrics().registry._collector_to_names
    names: dict[str, set[str]] = {"up": {"job", "instance"}}
    for collector in collectors:
        for family in collector.collect():
            labels = {*getattr(collector, "_labelnames", ()), "le", "instance", "job"}
            names |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return names


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_parses_and_asks_for_metrics_that_are_there(name: str) -> None:
    expression = EXPRESSIONS[name]
    promql_parser.parse(expression)
    metrics, known = re.findall(r"\b(?:vae|inf)_[a-z_]+|\bup\b", expression), exported()
    assert metrics
    assert set(metrics) <= set(known)
    grouped = {label.strip() for labels in re.findall(r"by \((.*?)\)", expression) for label in labels.split(",")}
    selected = set(re.findall(r"[{,]\s*([a-z_]+)\s*[=!]", expression))
    assert grouped | selected <= set().union(*(known[metric] for metric in metrics)), expression


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_legend_names_labels_that_the_expression_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        kept = re.findall(r"by \((.*?)\)", target["expr"])
        known = {label.strip() for label in kept[0].split(",")} if kept else {"instance", "process", "model"}
        assert shown <= known, target["legendFormat"]


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    asked = " ".join(EXPRESSIONS.values())
    for metric in ("vae_output_pixels", "vae_queue_wait", "vae_decode", "vae_encode", "vae_render", "vae_queue_depth"):
        assert metric in asked
    for metric in ("vae_resident_memory", "vae_rejected", "vae_worker_restarts", "vae_oom"):
        assert metric in asked


def test_every_alert_says_what_it_is_about() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert len(rule["annotations"]["summary"]) > 20


def test_compose_mounts_files_that_are_there_and_sets_options_that_exist() -> None:
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (COMPOSE / source).exists() if source.startswith(".") else source in compose["volumes"]
    options = {f"VAE_SERVER_{name.upper()}" for name in ServerOptions.model_fields}
    environment = compose["services"]["server"]["environment"]
    assert {name for name in environment if name.startswith("VAE_SERVER_")} <= options
    scraped = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["server:8000"]
    assert (COMPOSE / compose["services"]["server"]["build"]["context"] / "Dockerfile").is_file()
