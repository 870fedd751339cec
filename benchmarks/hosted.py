"""A server with the design of the hosted remote-VAE endpoints, with which `benchmarks.server` compares this server.

It was written from the description of that design: one request at a time under a semaphore, diffusers' own decode, its
VaeImageProcessor, and Pillow's default encoders. It understands the part of the contract that the benchmark uses.

It decodes on one permanent thread, which makes it faster than a plain asyncio.to_thread would: each thread that has run
torch keeps its OpenMP workers, and too many of them slow down everything.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
import yaml
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    body: bytes
    media_type: str
    headers: dict[str, str]


class Hosted:
    """The models, and the thread that decodes."""

    def __init__(self, folders: dict[str, str], dtype: torch.dtype) -> None:
        """Load the models. folders: the folder of each model, by name."""
        self.dtype = dtype
        self.vaes = {name: AutoencoderKL.from_pretrained(path, torch_dtype=dtype) for name, path in folders.items()}
        self.processor = VaeImageProcessor()
        self._one_at_a_time = asyncio.Semaphore(1)
        self._thread = ThreadPoolExecutor(1)

    async def decode(self, request: Request) -> Response:
        """Answer POST /predict?model=NAME."""
        body = await request.body()
        async with self._one_at_a_time:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._thread, self._answer, request.query_params, body)
        return Response(answer.body, headers=answer.headers, media_type=answer.media_type)

    @torch.no_grad()
    def _answer(self, query: QueryParams, body: bytes) -> Answer:
        shape = tuple(map(int, query.getlist("shape")))
        latents = torch.frombuffer(bytearray(body), dtype=DTYPES[query["dtype"]]).reshape(shape)  # [1, C, h, w]
        latents = latents.to(self.dtype) / float(query["scaling_factor"])
        sample = self.vaes[query["model"]].decode(latents, return_dict=False)[0]  # [1, 3, H, W]
        if query["output_type"] == "pt":
            headers = {"shape": str(list(sample.shape)), "dtype": NAMES[sample.dtype]}
            return Answer(sample.contiguous().view(torch.uint8).numpy().tobytes(), "tensor/binary", headers)
        buffer = io.BytesIO()
        format_name = "PNG" if query["image_format"] == "png" else "JPEG"
        self.processor.postprocess(sample, output_type="pil")[0].save(buffer, format_name)
        return Answer(buffer.getvalue(), f"image/{format_name.lower()}", {})


async def health(request: Request) -> Response:
    """Answer GET /health."""
    return PlainTextResponse("Ok")


def main() -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a models.yaml in which every `repo` is a folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    arguments = parser.parse_args()
    models = yaml.safe_load(arguments.config.read_text())["models"]
    hosted = Hosted({name: entry["repo"] for name, entry in models.items()}, DTYPES[arguments.dtype])
    app = Starlette(routes=[Route("/predict", hosted.decode, methods=["POST"]), Route("/health", health)])
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
