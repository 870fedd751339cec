"""The OpenAPI description of the server, which is written by hand in openapi.yaml beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .. import __version__

DESCRIPTION: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))
DESCRIPTION["info"]["version"] = __version__
