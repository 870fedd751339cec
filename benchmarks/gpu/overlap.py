"""Whether pinned buffers and a second stream would save time: copies after each decode, or beside the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import MEGA, synchronise
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae, video_vae
from server.engine.coders.build import build_coder
from server.engine.tensors import to_host
from server.model_info import Direction
from server.values import Layout

RUNS, ROUNDS = 12, 3
BUFFERS = 2  # of pinned memory: one is copied to while the other one is read
VIDEO = "Wan 2.1"


def run(report: Report) -> None:
    """Write the lines of this section."""
    torch.set_grad_enabled(False)
    sizes = sizes_for(report.device)
    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    vae, family = image_vae(report.device)
    coder = build_coder(vae.to(dtype), family, Direction.DECODE, "auto", "none")[0]
    side = sizes.image_sides[1]
    latents = torch.randn(1, 4, side // 8, side // 8)  # [1, C, h, w]
    for layout in (Layout.PIXELS, Layout.SAMPLE):
        measure(report, f"{side}x{side} as {layout.name.lower()}", coder, latents, layout, RUNS)
    del coder, vae
    vae, family = video_vae(VIDEO, report.device)
    spec, (frames, height, width) = family.describe(vae.config), sizes.clip
    coder = build_coder(vae.to(dtype), family, Direction.DECODE, "auto", "none")[0]
    ratio = spec.vae_scale_factor
    latents = torch.randn(
        1, spec.channels, (frames - 1) // spec.temporal_compression_ratio + 1, height // ratio, width // ratio
    )  # [1, C, F, h, w]
    measure(report, f"{VIDEO}, {frames}x{height}x{width} as pixels", coder, latents, Layout.PIXELS, 3)


def measure(report: Report, case: str, coder: Any, latents: Tensor, layout: Layout, runs: int) -> None:
    """Time some decodes of latents in the CPU's memory: without copies back, with them, and with overlapped ones.

    The ways alternate, and the fastest round of each counts.
    """
    device = torch.device(report.device)

    def decode() -> Tensor:
        result: Tensor = coder.decode(latents.to(device), layout).tensor
        return result

    for _ in range(3):  # chooses algorithms and records a graph
        output = decode()
    ways: dict[str, Callable[[], None]] = {
        "decode_ms": lambda: repeat(runs, decode),
        "then_copied_ms": lambda: repeat(runs, lambda: to_host(decode())),
    }
    if device.type == "cuda":
        ways["overlapped_ms"] = lambda: overlapped(runs, decode, output)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            report.check_time()
            synchronise(device)
            started = time.perf_counter()
            way()
            synchronise(device)
            best[name] = min(best[name], (time.perf_counter() - started) * 1e3 / runs)
    gain = 1 - best["overlapped_ms"] / best["then_copied_ms"] if device.type == "cuda" else None
    saved = None if gain is None else 100 * gain
    report.line(case, **best, answer_mb=output.nbytes / MEGA, saved_percent=saved)


def repeat(runs: int, call: Callable[[], object]) -> None:
    """Call a function some times."""
    for _ in range(runs):
        call()


def overlapped(runs: int, decode: Callable[[], Tensor], like: Tensor) -> None:
    """Decode some times. Each result is copied on a second stream to pinned memory beside the next decode.

    like: a tensor of the shape and dtype of the results.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    buffers = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(BUFFERS)]
    copied: list[torch.cuda.Event] = []
    for index in range(runs):
        output, buffer = decode(), buffers[index % BUFFERS]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            buffer.copy_(output, non_blocking=True)
            output.record_stream(side)
            copied.append(side.record_event())
        if index:
            copied[index - 1].synchronize()  # its answer can be sent from the pinned buffer
    copied[-1].synchronize()
