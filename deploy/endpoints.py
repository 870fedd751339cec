"""Test the repository with the packages of Inference Endpoints' default image, in a virtual environment.

The environment variable TOOLKIT names a folder with the source of huggingface-inference-toolkit, in whose app the
server is tested. Without it, only a stand-in for that app is used. This script needs Python 3.11, its standard library
and a package index. endpoints.md describes the rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGE = "deploy/endpoints-constraints.txt"
TESTS = ("tests/inprocess/test_handler.py", "tests/inprocess/test_toolkit.py", "tests/web/test_remote_decode.py")
TEST_PACKAGES = ("pytest>=9", "pytest-timeout")


def main() -> None:
    """Run the trial from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--env", type=Path, help="folder for the virtual environment, which is kept")
    chosen = parser.parse_args().env
    with tempfile.TemporaryDirectory() as folder:
        Trial((chosen or Path(folder) / "env").absolute()).run()


class Trial:
    """Tests in one virtual environment, first with the image's packages, then with the newest Starlette and uvicorn."""

    def __init__(self, folder: Path) -> None:
        """Prepare a trial. folder: where the environment will be."""
        self.folder = folder
        self.python = folder / "bin" / "python"

    def run(self) -> None:
        """Run all steps. Raises SystemExit at the first one that fails."""
        venv.create(self.folder, with_pip=True)
        self.pip("install", "-r", IMAGE)
        image = self.packages()
        # The container's entry point does the same at each start: only the installed packages constrain the versions.
        self.pip("install", "-r", "requirements.txt")
        say_what_changed(image, self.packages())
        self.pip("install", *TEST_PACKAGES)
        self.call("-m", "pytest", *TESTS, "-m", "not slow")
        self.pip("install", "--upgrade", "starlette", "uvicorn")
        self.call("-m", "pytest", *TESTS, "-m", "not slow")

    def packages(self) -> dict[str, str]:
        """Return the installed packages and their versions."""
        lines = self.call("-m", "pip", "freeze", is_read=True).splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    def pip(self, *arguments: str) -> None:
        """Run pip in the environment. Raises SystemExit if it fails."""
        self.call("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def call(self, *arguments: str, is_read: bool = False) -> str:
        """Run Python in the environment, with the repository as the working folder.

        is_read: return what it prints, instead of showing it. Raises SystemExit if it fails.
        """
        print("+ python", *arguments, flush=True)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command, stdout = (str(self.python), *arguments), subprocess.PIPE if is_read else None
        ran = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=stdout, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.returncode)
        return ran.stdout or ""


def say_what_changed(image: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Print which packages were added. Raises SystemExit if a package of the image was changed."""
    changed = sorted(name for name in image if after.get(name) != image[name])
    if changed:
        sys.exit(f"requirements.txt changes packages of the image: {', '.join(changed)}")
    added = (f"{name} {after[name]}" for name in sorted(after.keys() - image, key=str.lower))
    print(f"requirements.txt changes no package of the image and adds: {', '.join(added)}", flush=True)


if __name__ == "__main__":
    main()
