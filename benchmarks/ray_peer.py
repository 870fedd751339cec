"""Run deploy/ray_serve.yaml on this machine's CPU, for benchmarks.peers: `python -m benchmarks.ray_peer --help`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import psutil
import yaml

from server.config import SHIPPED_MODELS_YAML

ROOT = SHIPPED_MODELS_YAML.parent


def main() -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a models.yaml")
    parser.add_argument("--replicas", type=int, default=1, help="number of replicas, which share the cores")
    parser.add_argument("--most-clients", type=int, default=64, help="number of clients that must never be refused")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": arguments.port}
    (app,) = config["applications"]
    app["args"]["config"] = arguments.config
    environment = app["runtime_env"]["env_vars"]
    environment |= {"VAE_SERVER_MAX_QUEUE": str(arguments.most_clients), "VAE_SERVER_LOG_LEVEL": "warning"}
    front, replicas = app["deployments"]
    front["ray_actor_options"] = {"num_cpus": 0}
    # A replica gets as many OpenMP threads as CPUs.
    replicas["ray_actor_options"] = {"num_cpus": (psutil.cpu_count(logical=False) or 1) // arguments.replicas}
    del replicas["autoscaling_config"]
    replicas["num_replicas"] = arguments.replicas
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(config, file)
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray_proxy:middlewares",
    }
    serve = Path(sys.executable).with_name("serve")
    os.execv(serve, [str(serve), "run", "--app-dir", str(ROOT), file.name])


if __name__ == "__main__":
    main()
