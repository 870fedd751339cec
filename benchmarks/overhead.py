"""Measure what a request costs beyond its decode, by comparing the server with a decode and render in this process.

`python -m benchmarks.overhead [--latents 64] [--requests 20]` prints the median times, which are measured alternating,
and the difference. The server runs in its own process, and is also asked by diffusers' client.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import requests
import torch
from diffusers.utils.remote_utils import remote_decode

from server.config import SHIPPED_MODELS_YAML, load_settings
from server.inprocess.direct import Direct

FACTOR = 0.37304


@contextmanager
def serving() -> Iterator[str]:
    """Run a server of the bundled demo model on a free port, and yield its URL."""
    command = [sys.executable, "-m", "server", "serve", "demo", "--config", str(SHIPPED_MODELS_YAML), "--port", "0"]
    server = subprocess.Popen([*command, "--log-level", "warning"], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        ready = re.search(r"ready: (\S+)", server.stderr.readline())
        assert ready, "the server did not start"
        yield ready[1]
    finally:
        server.terminate()
        server.communicate()


def timed_ms(call: Callable[[], object]) -> float:
    """Return the time of a call in milliseconds."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=64, help="side of the latents; 64 is a 512x512 image")
    parser.add_argument("--requests", type=int, default=20)
    arguments = parser.parse_args()
    side = arguments.latents
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).half()
    direct = Direct(load_settings(("demo",), config=SHIPPED_MODELS_YAML))
    data = latents.numpy().tobytes()
    sent = {"shape": [1, 4, side, side], "dtype": "float16", "scaling_factor": FACTOR}
    session = requests.Session()

    print(f"{8 * side}x{8 * side}, demo model, {torch.get_num_threads()} threads, median of {arguments.requests}\n")
    print("| answer | bare decode + render, ms | kept connection, ms | diffusers' client, ms | server adds, ms |")
    print("| --- | --- | --- | --- | --- |")
    with serving() as url:
        for name, accept, parameters in (
            ("JPEG", "image/jpeg", {}),
            ("PNG", "image/png", {"image_format": "png"}),
            ("float tensor", "tensor/binary", {"output_type": "pt"}),
        ):

            def bare(parameters: dict[str, str] = parameters, accept: str = accept) -> None:
                request = direct.parse("demo", {**sent, **parameters}, data, accept)
                direct.render(request, direct.run(request))

            def kept(parameters: dict[str, str] = parameters, accept: str = accept) -> None:
                headers = {"Accept": accept, "Content-Type": "tensor/binary"}
                assert session.post(url, params={**sent, **parameters}, data=data, headers=headers).ok

            def client(parameters: dict[str, str] = parameters) -> None:
                options = {**parameters, "return_type": "pt"} if "output_type" in parameters else parameters
                remote_decode(url, latents, scaling_factor=FACTOR, **options)

            paths = (bare, kept, client)
            for path in paths:
                path()
            times: dict[Callable[[], None], list[float]] = {path: [] for path in paths}
            for _ in range(arguments.requests):
                for path in paths:
                    times[path].append(timed_ms(path))
            middle = {path: statistics.median(times[path]) for path in paths}
            added = statistics.median(k - b for k, b in zip(times[kept], times[bare], strict=True))
            print(f"| {name} | {middle[bare]:.1f} | {middle[kept]:.1f} | {middle[client]:.1f} | {added:.1f} |")


if __name__ == "__main__":
    main()
