"""The lines of the report: each is in the file of results before the next measurement begins."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = "| device | section | case | result |\n| --- | --- | --- | --- |"


class OutOfTime(Exception):
    """The time of a section is up."""


@dataclass(frozen=True)
class Report:
    """What a section gets: where it runs, where its lines go, and how long it may take.

    device: `cpu` or `cuda`. Every line is marked with it.
    path: the file of results, which has one JSON object on each line. The table is beside it and ends in `.md`.
    deadline: when the section must end, as `time.monotonic()`, which is the same in all processes of a machine.
    """

    device: str
    section: str
    path: Path
    deadline: float

    def line(self, case: str, **values: Any) -> None:
        """Write one line to the results and to the table, and print it. Values that are None are left out.

        error: only for what should not happen. An answer that refuses a request is not an error of the report.
        """
        known = {name: finite(value) for name, value in values.items() if value is not None}
        append(self.path, json.dumps({"device": self.device, "section": self.section, "case": case, **known}))
        result = ", ".join(f"{name} {shown(value)}" for name, value in known.items()).replace("|", "/")
        row = f"| {self.device} | {self.section} | {case} | {result} |"
        append(self.path.with_suffix(".md"), row)
        print(row, flush=True)

    @property
    def left_s(self) -> float:
        """How many seconds the section has left."""
        return self.deadline - time.monotonic()

    def check_time(self, needed_s: float = 0.0) -> None:
        """Raise OutOfTime if the section has no time for a measurement of so many seconds."""
        if self.left_s <= needed_s:
            raise OutOfTime


def append(path: Path, text: str) -> None:
    """Append a line to a file, and wait until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: infinity and NaN as words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """Return a value as text for the table: floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else " ".join(str(value).split())
