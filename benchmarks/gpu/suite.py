"""The tests that are marked `gpu`, each with its outcome and time.

The cases of the Triton kernels, which take a minute to compile, are left to `make test-gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.report import OutOfTime, Report

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MARK = "pytest.mark.gpu"


class Lines:
    """A plugin of pytest that writes a line for each test."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write how a test ended. A test that passed is written after its call, others after the step that ended it."""
        if report.when == "call" or not report.passed:
            failure = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
            self._report.line(
                report.nodeid.removeprefix("tests/"), outcome=report.outcome, s=report.duration, error=first(failure)
            )

    def pytest_runtest_setup(self) -> None:
        """Stop before a test for which there is no time."""
        if self._report.left_s <= 0:
            pytest.exit("the time of the section is up", returncode=0)


def run(report: Report) -> None:
    """Write the lines of this section."""
    report.check_time()
    tests = (REPOSITORY / "tests").rglob("test_*.py")
    files = [
        str(path)
        for path in sorted(tests)
        if path.name != "test_triton.py" and MARK in path.read_text(encoding="utf-8")
    ]
    flags = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:terminal", "-o", "addopts=", f"--rootdir={REPOSITORY}"]
    flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # this process has imported some of them already
    status = pytest.main([*flags, *files], plugins=[Lines(report)])
    if report.left_s <= 0:
        raise OutOfTime
    report.line("pytest -m gpu", files=len(files), status=int(status))


def first(texts: list[str]) -> str | None:
    """Return the first of some texts; None if there is none."""
    return texts[0][:300] if texts else None
