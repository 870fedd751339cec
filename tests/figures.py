"""The figures that tests measure: printed, kept in a file when VAE_FIGURES names one, and a page made of that file.

`make figures` runs those tests and writes docs/figures.md.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "figures.md"
HEAD = """# Figures

What the tests of the server's promises measured, made by `make figures`: every line is one test of `make test`, which fails
when a promise about answers is broken. Times are of the machine named below and no test fails on one.

"""


def figure(promise: str, measured: str) -> None:
    """Print what was measured of a promise, and keep it."""
    print(f"\nFIGURE {promise}: {measured}")
    if file := os.environ.get("VAE_FIGURES"):
        with Path(file).open("a") as lines:
            lines.write(json.dumps({"promise": promise, "measured": measured}) + "\n")


def cpu_class() -> str:
    """What the CPU multiplies in hardware, as far as Linux says it."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16 without AMX", "avx512f": "AVX512", "avx2": "AVX2"}
    return next((name for flag, name in known.items() if flag in flags), platform.machine())


def page(lines: list[str]) -> str:
    """Return the page of the figures that the tests wrote, the last of each promise."""
    found = {entry["promise"]: entry["measured"] for entry in map(json.loads, lines)}
    machine = f"{os.cpu_count()} cores, {platform.machine()} with {cpu_class()}, Python {platform.python_version()}"
    head = f"{machine}, {datetime.now(UTC):%Y-%m-%d}\n\n| promise | measured |\n| --- | --- |\n"
    return HEAD + head + "".join(f"| {promise} | {measured} |\n" for promise, measured in sorted(found.items()))


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).read_text().splitlines()))
