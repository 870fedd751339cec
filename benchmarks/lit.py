"""LitServe with this server's own decoder and encoders, so that only the serving differs.

LitServe's faster transport (`fast_queue`) is selected, although release 0.2.19 ignores it. The raw body and the query
reach LitServe's worker through a FastAPI dependency; its default would be JSON with base64. Batches are decoded as this
server decodes them.
"""

# There is no `from __future__ import annotations`, because LitServe passes the annotation of `request` to FastAPI.

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
    """A request, as LitServe's HTTP process sends it to its worker."""

    query: list[tuple[str, str]]
    accept: str
    body: bytes


async def read(request: Request) -> Sent:
    """Receive a request."""
    return Sent(request.query_params.multi_items(), request.headers.get("accept", ""), await request.body())


Work = tuple[VaeRequest, TensorResult]


class DecodeAPI(litserve.LitAPI):
    """The decode as an API of LitServe."""

    def __init__(self, settings: Settings, threads: int, batch_size: int, wait_s: float) -> None:
        """Make the API.

        threads: the threads of torch in each worker. batch_size: the largest batch; 1 turns LitServe's batching off.
        wait_s: how long LitServe waits for a batch to fill, in seconds.
        """
        super().__init__(max_batch_size=batch_size, batch_timeout=wait_s)
        self._settings = settings
        self._threads = threads
        self._batches = batch_size > 1

    def setup(self, device: str) -> None:
        """Load all models."""
        torch.set_num_threads(self._threads)
        self._engine = LoadedModels(self._settings)
        self._infos = {name: self._engine.describe(name) for name in self._settings.models}
        self._defaults = wire.RenderDefaults()
        for name in self._settings.models:
            self._engine.load(name)

    def decode_request(self, request: Annotated[Sent, Depends(read)]) -> VaeRequest:
        """Parse a request."""
        parameters = wire.Parameters(request.query)
        info = self._infos[parameters.text("model") or self._settings.default]
        job = wire.decode_job(parameters, request.accept, info, self._defaults)
        return wire.with_data(job, request.body)

    def batch(self, inputs: Sequence[VaeRequest]) -> Sequence[VaeRequest]:
        """Return the requests of a batch as they are."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Decode a request, or with batching a list of requests, which are all of the same shape in the benchmark."""
        requests = x if self._batches else [x]
        outcomes = self._engine.run(requests)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        works = list(zip(requests, outcomes, strict=True))
        return works if self._batches else works[0]

    def unbatch(self, output: list[Work]) -> list[Work]:
        """Return the results of a batch as they are."""
        return output

    def encode_response(self, output: Work) -> Response:
        """Render a result."""
        request, result = output
        rendered = format_named(request.job.format).render(result.body, request.job.render)
        return Response(bytes(rendered.body), headers=rendered.headers, media_type=rendered.media_type)


def main() -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch in each worker")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=0, help="how long to wait for a batch to fill")
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
