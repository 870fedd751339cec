"""The manifests, by Kubernetes' own schemas, and against what the server is."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml
from starlette.routing import Route

from server.config import ServerOptions
from server.metrics import Metrics
from server.web.routes import all_routes
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "kubernetes"
MANIFESTS: dict[str, Any] = {
    name: yaml.safe_load((FOLDER / name).read_text())
    for name in yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
}
POD = MANIFESTS["deployment.yaml"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_a_manifest_fits_its_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_every_file_is_listed() -> None:
    assert {*MANIFESTS, "kustomization.yaml"} == {path.name for path in FOLDER.glob("*.yaml")}


def test_the_pod_is_restricted() -> None:
    """What Kubernetes' restricted Pod Security Standard asks for, and a root that nobody writes to."""
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_probes_ask_routes_that_are_there_and_liveness_is_not_readiness() -> None:
    known = {route.path for route in all_routes(ServerOptions()) if isinstance(route, Route)}
    paths = {
        probe: CONTAINER[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert set(paths.values()) <= known
    assert paths["livenessProbe"] != paths["readinessProbe"]


def test_settings_are_options_and_the_drain_fits_the_grace_period() -> None:
    environment = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}
    options = {f"VAE_SERVER_{name.upper()}" for name in ServerOptions.model_fields}
    assert {name for name in environment if name.startswith("VAE_SERVER_")} <= options
    defaults = ServerOptions()
    longest_s = defaults.drain_timeout_s + float(environment["VAE_SERVER_DRAIN_NOTICE_S"] or 0)
    assert POD["terminationGracePeriodSeconds"] > longest_s


def test_the_autoscaler_watches_a_metric_of_the_server() -> None:
    (metric,) = MANIFESTS["autoscaler.yaml"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {family.name for family in Metrics().registry.collect()}
