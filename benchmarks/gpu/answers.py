"""Requests to this server's engine by a function call, and what it answers while memory is short."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.report import Report
from server.config import load_settings
from server.engine.device_errors import is_lost_device
from server.errors import ServerError
from server.inprocess.direct import Direct
from server.model_info import Direction

FACTOR = 8  # pixels per latent pixel, along each side


def engine(folder: Path, device: str, entries: dict[str, dict[str, Any]]) -> Direct:
    """Return an engine without loaded models. entries: the models of its models.yaml, by name."""
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"default": next(iter(entries)), "models": entries}))
    return Direct(load_settings(config=path, device=device))


def ask(direct: Direct, model: str, side: int, direction: Direction = Direction.DECODE) -> dict[str, Any]:
    """Decode to an image of this side, or encode one, and return what is known of the answer.

    steps: the measures that were taken because memory ran out. answer: the sentence of a refusal; with the status
    500 it is the error, which a client would not be told. Raises the error of a lost device.
    """
    generator = torch.Generator().manual_seed(side)
    if direction is Direction.DECODE:
        values = torch.randn(1, 4, side // FACTOR, side // FACTOR, generator=generator)  # [1, C, h, w]
    else:
        values = torch.rand(1, 3, side, side, generator=generator) * 2 - 1  # [1, 3, H, W]
    sent = {"shape": list(values.shape), "dtype": "float32"}
    started = time.perf_counter()
    try:
        request = direct.parse(model, sent, values.numpy().tobytes(), "*/*", direction)
        result = direct.run(request)
    except ServerError as error:
        detail = getattr(error, "detail", None)  # for the operator
        told = {"status": error.status, "code": error.code, "answer": str(error), "detail": detail}
        return {"ms": (time.perf_counter() - started) * 1e3, **told}
    except Exception as error:  # whatever it is, the report says it in a line
        if is_lost_device(error):
            raise
        told = {"status": ServerError.status, "code": ServerError.code, "answer": f"{type(error).__name__}: {error}"}
        return {"ms": (time.perf_counter() - started) * 1e3, **told}
    return {
        "ms": (time.perf_counter() - started) * 1e3,
        "device_ms": result.device_ms,
        "steps": list(result.oom_steps),
        "upcast": result.is_upcast or None,
    }


def loaded(direct: Direct) -> list[str]:
    """Return the names of the models that are loaded."""
    return sorted(direct.models.all_loaded())


def line(report: Report, case: str, told: dict[str, Any], **more: Any) -> None:
    """Write the line of an answer, with the memory that torch has reserved on a GPU."""
    reserved = torch.cuda.memory_reserved() / 1e6 if report.device == "cuda" else None
    report.line(case, **told, **more, reserved_mb=reserved)
