"""The software bill of materials, of the packages in this environment, and its validation by the SPDX project's tools."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow

TOOLS = Path(sys.prefix) / "sbom"  # `make sbom` installs them there
PACKAGES = Path(torch.__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """Skip these tests if the tools are not installed, except in continuous integration, which must run them."""
    if not (TOOLS / ".installed").exists():
        missing = f"no tools in {TOOLS}: make sbom"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


def write(packages: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [TOOLS / "bin" / "python", "-m", "deploy.sbom", packages, out]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sbom") / "sbom.spdx.json"
    wrote = write(PACKAGES, out)
    assert wrote.returncode == 0, wrote.stderr
    return out


@pytest.fixture(scope="module")
def packages(file: Path) -> dict[str, dict[str, Any]]:
    return {package["name"]: package for package in json.loads(file.read_text())["packages"]}


def test_the_tools_of_the_spdx_project_find_it_valid(file: Path, tmp_path: Path) -> None:
    validate = [TOOLS / "bin" / "pyspdxtools", "--infile"]
    checked = subprocess.run([*validate, file], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert checked.returncode == 0, checked.stderr
    broken = tmp_path / "broken.spdx.json"
    broken.write_text(file.read_text().replace('"GPL-3.0-or-later"', '"no licence of the list"'))
    refused = subprocess.run([*validate, broken], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert refused.returncode != 0, "the tools check licences"


@pytest.mark.parametrize(
    ("name", "licence"),
    [("torch", "BSD-3-Clause"), ("diffusers", "Apache-2.0"), ("imageio-ffmpeg", "BSD-2-Clause"), ("pillow", "MIT-CMU")],
)
def test_it_has_the_version_and_the_licence_of_a_package(
    packages: dict[str, dict[str, Any]], name: str, licence: str
) -> None:
    assert packages[name]["versionInfo"] == version(name)
    assert licence in packages[name]["licenseDeclared"].split(" AND ")


def test_it_has_the_ffmpeg_of_imageio_ffmpeg(file: Path, packages: dict[str, dict[str, Any]]) -> None:
    executable, ffmpeg = imageio_ffmpeg.get_ffmpeg_exe(), packages["ffmpeg"]
    told = subprocess.run([executable, "-L"], capture_output=True, text=True, check=True).stdout
    assert "GNU General Public License" in told
    assert "version 3 of the License, or" in told
    assert ffmpeg["licenseDeclared"] == "GPL-3.0-or-later"
    assert ffmpeg["versionInfo"] in imageio_ffmpeg.get_ffmpeg_version()
    digest = hashlib.sha256(Path(executable).read_bytes()).hexdigest()
    assert ffmpeg["checksums"] == [{"algorithm": "SHA256", "checksumValue": digest}]
    inside = {
        "spdxElementId": packages["imageio-ffmpeg"]["SPDXID"],
        "relatedSpdxElement": ffmpeg["SPDXID"],
        "relationshipType": "CONTAINS",
    }
    assert inside in json.loads(file.read_text())["relationships"]


def test_it_has_what_packages_need_and_nothing_else(packages: dict[str, dict[str, Any]]) -> None:
    assert {"tokenizers", "sympy", "uvloop", "h11"} <= set(packages), "uvloop by way of an extra"
    assert not {"pytest", "ray", "mypy", "playwright"} & set(packages)


def test_an_environment_without_the_packages_is_refused(tmp_path: Path) -> None:
    refused = write(tmp_path, tmp_path / "sbom.spdx.json")
    assert (refused.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "install what serving needs with `make serve`" in refused.stderr
