"""Plot what `benchmarks.server --save NAME` wrote: `python -m benchmarks.plot_server NAME` draws results/NAME.svg."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from benchmarks.peers import HOSTED, LIT, LIT_BATCHED, LIT_WORKERS, OURS

RESULTS = Path(__file__).parent / "results"
BARE = "bare"
COLOURS = {OURS: "#0072b2", HOSTED: "#d55e00", LIT: "#009e73", LIT_BATCHED: "#56b4e9", LIT_WORKERS: "#cc79a7"}

Row = dict[str, Any]


def main() -> None:
    """Draw the plot from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the name that was given to --save")
    arguments = parser.parse_args()
    saved = json.loads((RESULTS / f"{arguments.name}.json").read_text())
    plt.rcParams |= {"svg.hashsalt": arguments.name, "font.size": 9}  # so that the same numbers give the same file
    figure = draw(saved["rows"], f"{saved['machine'].split(', load')[0]}, {saved['date']}")
    figure.savefig(RESULTS / f"{arguments.name}.svg", metadata={"Date": None})


def draw(rows: list[Row], title: str) -> plt.Figure:
    """Plot throughput against clients, in a grid with a row for each case and a column for each kind of answer."""
    cases, answers = ([*dict.fromkeys(row[key] for row in rows)] for key in ("case", "answer"))
    size = (3.6 * len(answers), 0.9 + 2.6 * len(cases))
    figure, grid = plt.subplots(len(cases), len(answers), figsize=size, squeeze=False, layout="constrained")
    for line, case in zip(grid, cases, strict=True):
        for axes, answer in zip(line, answers, strict=True):
            draw_one(axes, [row for row in rows if (row["case"], row["answer"]) == (case, answer)])
            axes.set_title(f"{case}, {answer}")
        line[0].set_ylabel("answers per second")
    for axes in grid[-1]:
        axes.set_xlabel("clients")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    return figure


def draw_one(axes: Axes, rows: list[Row]) -> None:
    """Draw one plot, with a line for each server."""
    for server in dict.fromkeys(row["server"] for row in rows):
        own = [row for row in rows if row["server"] == server]
        clients, per_s = [row["clients"] for row in own], [row["per_s"] for row in own]
        if server == BARE:
            axes.plot(clients, per_s, label="bare loop", color="black", linestyle="--", linewidth=1)
        else:
            axes.plot(clients, per_s, label=server, color=COLOURS[server], marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(count) for count in clients])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
