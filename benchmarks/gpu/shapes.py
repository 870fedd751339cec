"""Twelve shapes in rotation, and one shape with smaller and smaller budgets: recordings of graphs, and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import MEGA
from benchmarks.gpu.measure import milliseconds
from benchmarks.gpu.recorders import CountingRecorder, with_graphs
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae
from server.engine.coders.build import build_coder
from server.engine.graphs import GRAPHS
from server.model_info import Direction
from server.values import Layout

SHAPES, ROUNDS = 12, 4
BUDGETS, CALLS = 12, 3


def run(report: Report) -> None:
    """Write the lines of this section."""
    torch.set_grad_enabled(False)
    vae, family = image_vae(report.device)
    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    coder = build_coder(vae.to(dtype), family, Direction.DECODE, "auto", "none")[0]
    step = sizes_for(report.device).shape_step
    shapes = [(step * (8 + index), 12 * step) for index in range(SHAPES)]  # h, w
    for count in (GRAPHS, SHAPES):
        rotate(report, coder, shapes[:count])
    shrink(report, coder, (16 * step, 16 * step))


def rotate(report: Report, coder: Any, shapes: Sequence[tuple[int, int]]) -> None:
    """Decode some shapes one after the other, several rounds."""
    recorder = with_graphs(coder, report.device)
    for number in range(ROUNDS):
        report.check_time()
        before, seconds = recorder.recorded, recorder.seconds
        times = [milliseconds(lambda x: decode(coder, x), latents(report, shape)) for shape in shapes]
        report.line(
            f"{len(shapes)} shapes in rotation, round {number + 1}",
            recordings=recorder.recorded - before,
            recording_ms=(recorder.seconds - seconds) * 1e3,
            kept=len(coder.graphs),
            mean_ms=sum(times) / len(times),
            longest_ms=max(times),
            **held(recorder, report.device),
        )
    coder.free_caches()


def shrink(report: Report, coder: Any, shape: tuple[int, int]) -> None:
    """Decode one shape with budgets that get smaller, as on a GPU that other processes fill."""
    recorder, x = with_graphs(coder, report.device), latents(report, shape)
    ample = coder.peak_bytes(1, *shape, 1 << 60)
    for number in range(BUDGETS):
        report.check_time()
        before, began = recorder.recorded, time.perf_counter()
        budget = int(ample * 1.1 * (1 - number / BUDGETS))
        plan = coder.plan(1, *shape, budget)
        times = [milliseconds(lambda x, budget=budget: decode(coder, x, budget), x) for _ in range(CALLS)]
        report.line(
            f"{8 * shape[0]}x{8 * shape[1]} with a budget of {100 * budget / ample:.0f} % of the ample one",
            budget_mb=budget / MEGA,
            planned_mb=coder.peak_bytes(1, *shape, budget) / MEGA,
            band_mb=plan.band_bytes / MEGA,
            recomputes=plan.recomputes,
            recordings=recorder.recorded - before,
            last_ms=times[-1],
            all_ms=(time.perf_counter() - began) * 1e3,
            **held(recorder, report.device),
        )
    coder.free_caches()


def latents(report: Report, shape: tuple[int, int]) -> Tensor:
    """Return random latents of h x w."""
    return torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0)).to(report.device)  # [1, C, h, w]


def decode(coder: Any, x: Tensor, budget_bytes: int | None = None) -> Tensor:  # [1, C, h, w]
    """Decode to pixels, as for an image."""
    pixels: Tensor = coder.decode(x, Layout.PIXELS, budget_bytes=budget_bytes).tensor  # [1, H, W, 3]
    return pixels


def held(recorder: CountingRecorder, device: str) -> dict[str, float]:
    """Return what the graphs hold, and what torch has reserved, in MB."""
    if device == "cpu":
        return {"graphs_mb": recorder.held_bytes / MEGA}
    return {"graphs_mb": recorder.held_bytes / MEGA, "reserved_mb": torch.cuda.memory_reserved() / MEGA}
