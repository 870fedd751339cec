"""Plot time and memory against pixels: draw an SVG for each results/decode-*.json of benchmarks.decode.

`python -m benchmarks.plot`
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
OURS = {"ours": "tab:red", "ours, recomputing": "tab:orange", "ours, one band": "tab:pink", "ours, fp32": "tab:purple"}


def main() -> None:
    """Draw all plots."""
    for path in sorted(RESULTS.glob("decode-*.json")):
        saved = json.loads(path.read_text())
        figure, (time, memory) = plt.subplots(1, 2, figsize=(13, 5))
        draw(time, saved["rows"], "s", 1.0, "seconds")
        draw(memory, saved["rows"], "peak_bytes", 1e9, "peak activations, GB")
        figure.suptitle(f"AutoencoderKL decode, {saved['machine']}, {saved['date']}")
        handles, labels = time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
        figure.tight_layout(rect=(0, 0, 0.8, 1))
        figure.savefig(path.with_suffix(".svg"))
        print(path.with_suffix(".svg"))


def draw(axes: Axes, rows: list[dict[str, Any]], value: str, unit: float, label: str) -> None:
    """Draw one value of the rows against megapixels. unit: divides the value."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        lines[row["decode"]].append((row["size"] ** 2 / 1e6, row[value] / unit))
    for name, points in lines.items():
        is_ours = name in OURS
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=4, label=name, color=OURS.get(name),
            linewidth=2.5 if name == "ours" else 1.2, linestyle="-" if is_ours else "--",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=label)
    axes.grid(True, which="both", alpha=0.3)


if __name__ == "__main__":
    main()
