"""Decodes beside a second process that occupies the memory: which measures are taken, and how a refusal is worded.

"ours" plans for the memory that is free. "ours, greedy" is told that there is ample memory, so that it runs out in the
middle, as if the other process had grown after the plan was made. "diffusers" has no plan.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.gpu.answers import ask, engine, line
from benchmarks.gpu.neighbour import little_memory
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae

AMPLE_MB = 1 << 20


def run(report: Report) -> None:
    """Write the lines of this section."""
    sizes = sizes_for(report.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_vae(report.device)[0].save_pretrained(folder / "vae")
        entries = {
            "ours": {"repo": str(folder / "vae")},
            "greedy": {"repo": str(folder / "vae"), "memory_budget_mb": AMPLE_MB},
            "diffusers": {"repo": str(folder / "vae"), "decoder": "diffusers"},
        }
        # An engine for each model, because otherwise the others would be unloaded when memory runs out.
        engines = {model: engine(folder, report.device, {model: entry}) for model, entry in entries.items()}
        for model, direct in engines.items():
            line(report, f"{model}, ample memory", ask(direct, model, sizes.memory_sides[0]))
        for left_mb in sizes.left_mb:
            with little_memory(report.device, left_mb) as held_mb:
                for model, direct in engines.items():
                    for side in sizes.memory_sides:
                        report.check_time()
                        told = ask(direct, model, side)
                        line(report, f"{model}, {side}x{side}, {left_mb} MiB left", told, neighbour_mb=held_mb)
        report.check_time()
        with little_memory(report.device, 1) as held_mb:
            fresh = engine(folder, report.device, {"fresh": {"repo": str(folder / "vae")}})
            line(report, "a model that is loaded with 1 MiB left", ask(fresh, "fresh", 64), neighbour_mb=held_mb)
        for model, direct in engines.items():
            line(report, f"{model}, ample memory again", ask(direct, model, sizes.memory_sides[0]))
