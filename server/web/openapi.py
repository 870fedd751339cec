"""The OpenAPI description of the server, which is written by hand in openapi.yaml beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .. import __version__


def _described() -> dict[str, Any]:
    """Read the file, and add what YAML cannot say.

    A path that names the model has no parameter `model` in its query, which the server would ignore.
    """
    description: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))
    description["info"]["version"] = __version__
    for path, item in description["paths"].items():
        if path.startswith("/{model}"):
            others = [parameter for parameter in item["post"]["parameters"] if parameter["name"] != "model"]
            item["post"] = {**item["post"], "parameters": others}
    return description


DESCRIPTION = _described()
