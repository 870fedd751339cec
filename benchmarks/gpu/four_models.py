"""Four models on one device, both directions, then one large image while little memory is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.gpu.answers import ask, engine, line, loaded
from benchmarks.gpu.neighbour import little_memory
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae
from server.model_info import Direction

MODELS = ("one", "two", "three", "four")
CALLS = 3  # the second one records a graph


def run(report: Report) -> None:
    """Write the lines of this section."""
    sizes = sizes_for(report.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_vae(report.device)[0].save_pretrained(folder / "vae")
        direct = engine(folder, report.device, {model: {"repo": str(folder / "vae")} for model in MODELS})
        for left_mb in sizes.left_mb:
            for model in MODELS:
                report.check_time()
                for direction in Direction:
                    told = [ask(direct, model, sizes.image_sides[0], direction) for _ in range(CALLS)][-1]
                    case = f"{model}, {direction} {sizes.image_sides[0]}x{sizes.image_sides[0]}"
                    line(report, case, told, loaded=loaded(direct))
            with little_memory(report.device, left_mb) as held_mb:
                case = f"{MODELS[0]}, decode {sizes.large_side}x{sizes.large_side}, {left_mb} MiB left"
                before = loaded(direct)
                told = ask(direct, MODELS[0], sizes.large_side)
                line(report, case, told, loaded_before=before, loaded=loaded(direct), neighbour_mb=held_mb)
