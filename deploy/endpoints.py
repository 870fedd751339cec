"""Try the repository with the packages of the default image of Inference Endpoints, in an environment of their own.

TOOLKIT names the folder of huggingface-inference-toolkit's source, in whose app the server is tried; without it, in a
stand-in of that app alone. Needs the standard library, Python 3.11 and a package index. endpoints.md has the rest.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--env", type=Path, help="make the environment here, and keep it")
    chosen = parser.parse_args().env
    with tempfile.TemporaryDirectory() as folder:
        Trial((chosen or Path(folder) / "env").absolute()).run()


class Trial:
    """One environment, first as the image has it, then with the newest Starlette."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def run(self) -> None:
        """Raises SystemExit at the first step that fails."""
        venv.create(self.folder, with_pip=True)
        self.pip("install", "-r", IMAGE)
        image = self.packages()
        # As the container's entry point does at each start: with no constraint but what is there.
        self.pip("install", "-r", "requirements.txt")
        say_what_changed(image, self.packages())
        self.pip("install", *TEST_PACKAGES)
        self.call("-m", "pytest", *TESTS, "-m", "not slow")
        self.pip("install", "--upgrade", "starlette", "uvicorn")
        self.call("-m", "pytest", *TESTS, "-m", "not slow")

    def packages(self) -> dict[str, str]:
        lines = self.call("-m", "pip", "freeze", is_read=True).splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    def pip(self, *arguments: str) -> None:
        self.call("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def call(self, *arguments: str, is_read: bool = False) -> str:
        """With this repository as the working folder, and nothing of another environment."""
        print("+ python", *arguments, flush=True)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command, stdout = (str(self.python), *arguments), subprocess.PIPE if is_read else None
        ran = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=stdout, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.returncode)
        return ran.stdout or ""


def say_what_changed(image: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Exits unless all that the image had is as it was."""
    changed = sorted(name for name in image if after.get(name) != image[name])
    if changed:
        sys.exit(f"requirements.txt changes what the image has: {', '.join(changed)}")
    added = (f"{name} {after[name]}" for name in sorted(after.keys() - image, key=str.lower))
    print(f"requirements.txt changes nothing of the image and adds: {', '.join(added)}", flush=True)


if __name__ == "__main__":
    main()
