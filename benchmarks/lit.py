"""LitServe around this server's own decoder and encoders: the same work a request, so that what differs is serving.

Its faster transport (`fast_queue`) is asked for, though release 0.2.19 ignores it. Raw bodies and query parameters
reach LitServe's worker by a FastAPI dependency, where its default would be JSON with base64. Batches are decoded as
this server decodes them.
"""

# Without `from __future__ import annotations`: LitServe hands the annotation of `request` on to FastAPI.

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import litserve
import torch
from fastapi import Depends, Request
from fastapi.responses import Response

from server import contract as wire
from server.config import Settings, load_settings
from server.engine.models import LoadedModels
from server.outputs import format_named
from server.values import Request as VaeRequest
from server.values import TensorResult

TIMEOUT_S = 300


@dataclass(frozen=True)
class Sent:
    """What crosses from LitServe's HTTP process to its worker."""

    query: list[tuple[str, str]]
    accept: str
    body: bytes


async def read(request: Request) -> Sent:
    return Sent(request.query_params.multi_items(), request.headers.get("accept", ""), await request.body())


Work = tuple[VaeRequest, TensorResult]


class DecodeAPI(litserve.LitAPI):
    """`batch_size` of 1 turns LitServe's batching off."""

    def __init__(self, settings: Settings, threads: int, batch_size: int, wait_s: float) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=wait_s)
        self._settings = settings
        self._threads = threads
        self._batches = batch_size > 1

    def setup(self, device: str) -> None:
        torch.set_num_threads(self._threads)
        self._engine = LoadedModels(self._settings)
        self._infos = {name: self._engine.describe(name) for name in self._settings.models}
        self._defaults = wire.RenderDefaults()
        for name in self._settings.models:
            self._engine.load(name)

    def decode_request(self, request: Annotated[Sent, Depends(read)]) -> VaeRequest:
        parameters = wire.Parameters(request.query)
        info = self._infos[parameters.text("model") or self._settings.default]
        job = wire.decode_job(parameters, request.accept, info, self._defaults)
        return wire.with_data(job, request.body)

    def batch(self, inputs: Sequence[VaeRequest]) -> Sequence[VaeRequest]:
        return inputs

    def predict(self, x: Any) -> Any:
        """One request to one result, or with batching a list of them to as many; the benchmark's are all alike."""
        requests = x if self._batches else [x]
        outcomes = self._engine.run(requests)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        works = list(zip(requests, outcomes, strict=True))
        return works if self._batches else works[0]

    def unbatch(self, output: list[Work]) -> list[Work]:
        return output

    def encode_response(self, output: Work) -> Response:
        request, result = output
        rendered = format_named(request.job.format).render(result.body, request.job.render)
        return Response(bytes(rendered.body), headers=rendered.headers, media_type=rendered.media_type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, in each worker")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=0, help="for a batch to fill")
    arguments = parser.parse_args()
    settings = load_settings(config=arguments.config)
    api = DecodeAPI(settings, arguments.threads, arguments.batch_size, arguments.wait_ms / 1e3)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=arguments.workers, timeout=TIMEOUT_S, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False, num_api_servers=1
    )


if __name__ == "__main__":
    main()
