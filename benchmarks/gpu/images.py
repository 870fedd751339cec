"""Images of all sizes, both directions: without a graph, with a graph, and by diffusers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import MEGA
from benchmarks.families import psnr
from benchmarks.families import run as run_coder
from benchmarks.gpu.measure import Run, free_caches, measured, refusal_of
from benchmarks.gpu.recorders import with_graphs
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae
from server.engine.coders.build import build_coder
from server.engine.coders.stock import StockDecoder, StockEncoder
from server.engine.graphs import GRAPH_PIXELS
from server.model_info import Direction
from server.values import Layout

FACTOR = 8  # pixels per latent pixel, along each side


def run(report: Report) -> None:
    """Write the lines of this section."""
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference of quality
    sizes = sizes_for(report.device)
    coders = {direction: coders_of(report.device, direction) for direction in Direction}
    for side in sizes.image_sides:
        for direction in Direction:
            measure(report, side, direction, coders[direction])
            free_caches(report.device)


def coders_of(device: str, direction: Direction) -> dict[tuple[str, str], Any]:
    """Return diffusers' and our coders of one direction, by their name and the name of their dtype."""
    vae, family = image_vae(device)
    stock: Any = StockEncoder if direction is Direction.ENCODE else StockDecoder
    coders = {("diffusers", "float32"): stock(copy.deepcopy(vae), family)}
    for name in sorted(sizes_for(device).dtypes, key=lambda name: name != "float32"):
        half = copy.deepcopy(vae).to(getattr(torch, name))
        if name != "float32":
            nhwc = copy.deepcopy(half).to(memory_format=torch.channels_last)
            coders["diffusers", name] = stock(nhwc, family)
        coders["ours", name] = build_coder(half, family, direction, "auto", "none")[0]
    return coders


def measure(report: Report, side: int, direction: Direction, coders: dict[tuple[str, str], Any]) -> None:
    """Measure all coders of one direction at one size.

    The first one that does not run out of memory is the reference: diffusers in float32, or else ours in float32.
    """
    generator = torch.Generator().manual_seed(side)
    if direction is Direction.DECODE:
        values = torch.randn(1, 4, side // FACTOR, side // FACTOR, generator=generator)  # [1, C, h, w]
    else:
        values = torch.rand(1, 3, side, side, generator=generator) * 2 - 1  # [1, 3, H, W]
    values = values.to(report.device)
    reference, against = None, None
    for (who, dtype), coder in coders.items():
        ways: dict[str, Run] = {"": lambda x, coder=coder: run_coder(coder, direction, x)}
        if who == "ours":
            ways = {"eager": partial(eager, coder, direction)}
            if side * side <= GRAPH_PIXELS:
                with_graphs(coder, report.device)
                ways["graph"] = lambda x, coder=coder: coded(coder, direction, x)
        for way, call in ways.items():
            report.check_time()
            case = " ".join(filter(None, (f"{side}x{side}", str(direction), who, dtype, way)))
            output = written(report, case, call, values, planned_mb(coder, values), reference, coder, against)
            if reference is None and output is not None:
                reference, against = output, None if who == "diffusers" else case
            del output
        coder.free_caches()
        free_caches(report.device)


def written(
    report: Report,
    case: str,
    call: Run,
    values: Tensor,
    planned: float | None,
    reference: Tensor | None,
    coder: Any,
    against: str | None = None,
) -> Tensor | None:
    """Measure a call, write its line, and return its output in float32 on the CPU; None if memory ran out.

    planned: the planned peak in MB. against: the case of the reference if that is not diffusers in float32.
    """
    try:
        found = measured(report, call, values)
    except Exception as error:  # noqa: BLE001  # out of memory, which is an answer; others are raised again
        report.line(case, answer=refusal_of(error))
        free_caches(report.device)
        return None
    graphs, output = getattr(coder, "graphs", None), found.output.float().cpu()
    has_recordings = graphs is not None and len(graphs) > 0
    report.line(
        case,
        first_ms=found.first_ms,
        second_ms=found.second_ms,
        steady_ms=found.steady_ms,
        planned_mb=planned,
        real_mb=found.real_mb,
        graphs_mb=graphs.recorder.held_bytes / MEGA if has_recordings else None,
        psnr_db=None if reference is None else psnr(output, reference),
        against=against,
    )
    return output


def coded(coder: Any, direction: Direction, values: Tensor) -> Tensor:
    """Run our coder as the server does, with the memory that is free."""
    coded = coder.encode(values) if direction is Direction.ENCODE else coder.decode(values, Layout.SAMPLE)
    result: Tensor = coded.tensor
    return result


@torch.inference_mode()
def eager(coder: Any, direction: Direction, values: Tensor) -> Tensor:
    """Run our coder as planned for the memory that is free, without a graph."""
    values = values.to(coder.network.dtype)  # [1, C, ...]
    plan = coder.plan(values.shape[0], *values.shape[2:])
    rest = {"layout": Layout.SAMPLE} if direction is Direction.DECODE else {}
    result: Tensor = coder.run(plan, values, **rest)[0]
    return result


def planned_mb(coder: Any, values: Tensor) -> float | None:
    """Return the peak memory that our coder plans, in MB. diffusers has no plan."""
    peak_bytes = getattr(coder, "peak_bytes", None)
    return None if peak_bytes is None else peak_bytes(values.shape[0], *values.shape[2:]) / MEGA
