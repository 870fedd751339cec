"""Not the toolkit, a stand-in of its name: a Starlette app whose start-up hook makes the handler as the toolkit's does.

For where the toolkit's own code is not at hand, and for a Starlette that it does not run with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import util
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

handlers: list[Any] = []


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    folder = os.environ["HF_MODEL_DIR"]
    spec = util.spec_from_file_location("handler.EndpointHandler", f"{folder}/handler.py")
    assert spec
    assert spec.loader
    sys.path.insert(0, folder)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handlers.append(module.EndpointHandler(folder))
    yield


async def health(request: Request) -> Response:
    return PlainTextResponse("Ok")


async def predict(request: Request) -> Response:
    answer = handlers[0](await request.json())
    answer.save("/dev/null", "PNG")
    return PlainTextResponse(f"{answer.size}")


app = Starlette(
    routes=[
        Route("/", health),
        Route("/health", health),
        Route("/", predict, methods=["POST"]),
        Route(os.environ.get("AIP_PREDICT_ROUTE", "/predict"), predict, methods=["POST"]),
    ],
    lifespan=lifespan,
)
