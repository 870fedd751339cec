"""One clip of each video family that has our own layers, in each dtype, against diffusers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import MEGA
from benchmarks.families import CASES, input_of
from benchmarks.families import run as run_coder
from benchmarks.gpu.images import written
from benchmarks.gpu.measure import free_caches
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import video_vae
from server.engine.coders.build import build_coder
from server.engine.coders.stock import StockDecoder, StockEncoder
from server.model_info import Direction

USUAL = ("float32", "bfloat16")


def run(report: Report) -> None:
    """Write the lines of this section: all families' decodes, then their encodes, first in the usual dtypes."""
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference of quality
    references: dict[tuple[str, Direction], Tensor] = {}
    others = [name for name in sizes_for(report.device).dtypes if name not in USUAL]
    for dtypes in (USUAL, others):
        for direction in Direction:
            for case in CASES:
                report.check_time()
                measure(report, case, direction, dtypes, references)
                free_caches(report.device)


def measure(
    report: Report,
    case: str,
    direction: Direction,
    dtypes: Sequence[str],
    references: dict[tuple[str, Direction], Tensor],
) -> None:
    """Measure diffusers and ours in some dtypes, with one video.

    references: what diffusers makes in float32, on the CPU; gets that of this case if float32 is one of the dtypes and
        the memory suffices.
    """
    sizes = sizes_for(report.device)
    vae, family = video_vae(case, report.device)
    spec = family.describe(vae.config)
    frames, height, width = sizes.clip
    latents = (spec.channels, height // spec.vae_scale_factor, width // spec.vae_scale_factor)  # C, h, w
    if len(CASES[case].latents) == 4:
        latents = (latents[0], (frames - 1) // spec.temporal_compression_ratio + 1, *latents[1:])  # C, F, h, w
    torch.manual_seed(0)
    values = input_of(latents, spec, direction).to(report.device)  # [1, C, (F,) h, w] or pixels
    stock: Any = StockEncoder if direction is Direction.ENCODE else StockDecoder
    for dtype in dtypes:
        for who in ("diffusers", "ours"):
            report.check_time()
            part = copy.deepcopy(vae).to(getattr(torch, dtype))
            coder = (
                stock(part, family) if who == "diffusers" else build_coder(part, family, direction, "auto", "none")[0]
            )
            size = "x".join(map(str, values.shape[2:]))
            name = (
                f"{case} {direction} of {size}, {who}{'' if who != 'ours' or coder.name == 'exact' else ' (diffusers)'}"
            )
            output = written(
                report,
                f"{name} {dtype}",
                lambda x, coder=coder: run_coder(coder, direction, x),
                values,
                planned_mb(coder, latents),
                references.get((case, direction)),
                coder,
            )
            if output is not None and (who, dtype) == ("diffusers", "float32"):
                references[case, direction] = output
            del coder, part, output
            free_caches(report.device)


def planned_mb(coder: Any, latents: tuple[int, ...]) -> float | None:
    """Return the peak memory that our coder plans with ample memory, in MB. diffusers has no plan."""
    if not hasattr(coder, "plan"):
        return None
    frames = latents[1] if len(latents) == 4 else 1
    return coder.plan(frames, *latents[-2:], 1 << 60).peak_bytes / MEGA
