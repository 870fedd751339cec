"""Describe mistakes in the configuration."""

from __future__ import annotations

import difflib
from typing import Any

DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)(,(cpu|cuda:\d+))*$"
ROUTE = r"^/[A-Za-z0-9._~:/-]*$"
CLASS = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
DECODER = rf"^(auto|diffusers|plain|{CLASS})$"
FILE = r"^[^/\\]+\.safetensors$"
ORIGIN = r"(null|[a-z][a-z0-9+.-]*://[^\s,/?#@]+)"
ORIGINS = rf"^(\*|{ORIGIN}(\s*,\s*{ORIGIN})*)$"
PATTERNS = {
    DEVICE: "auto, cpu, mps, cuda or cuda:N",
    DEVICES: "auto, cpu, mps, cuda or cuda:N, or several of cpu and cuda:N separated by commas",
    DECODER: "auto, diffusers, plain, or the class of an installed package as package.module:Class",
    FILE: "the name of a .safetensors file",
    ROUTE: "a path that starts with /",
    ORIGINS: "origins as browsers send them, such as https://app.example, separated by commas, or *",
}
"""The patterns of values, and a description of what each accepts."""


def expected(problem: Any) -> str:
    """Return what pydantic expected, such as "expected a valid integer". problem: one of `ValidationError.errors()`."""
    if problem["type"] == "string_pattern_mismatch":
        return f"expected {PATTERNS[problem['ctx']['pattern']]}"
    message = str(problem["msg"])
    return "expected " + message.removeprefix("Input should be ") if message.startswith("Input") else message


def nearest(word: str, known: list[str]) -> str:
    """Return `, did you mean 'NAME'?` for the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word, known, 1)
    return f", did you mean '{close[0]}'?" if close else ""
