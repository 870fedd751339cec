"""A page of the server in a real browser."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium")
needs_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

DEMO = {"demo": {"repo": str(REPOSITORY / "server" / "demo"), "dtype": "float32"}}


def open_page(browser: Any, url: str, model: str = "", **context: Any) -> Any:
    """model: is chosen by hand."""
    page = browser.new_page(**context)
    page.set_default_timeout(1e3 * PATIENCE_S)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    page.problems = problems
    if model:
        page.select_option("#model", model)
    return page
