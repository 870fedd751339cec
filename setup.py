"""Builds the package `vae_server` from the folder server/. Everything else about it is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

NAME = "vae_server"
FOLDER = "server"


class Build(build_py):
    """Copies the files of the package, and the models.yaml that lies beside it in the repository."""

    def run(self) -> None:
        """Copy everything."""
        super().run()
        if not self.editable_mode:
            self.copy_file("models.yaml", str(Path(self.build_lib) / NAME / "models.yaml"))

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Leave out the script that trained the embedded model, which serving does not need."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != (f"{NAME}.demo", "train")]


setup(
    packages=[NAME, *(f"{NAME}.{name}" for name in find_packages(FOLDER))],
    cmdclass={"build_py": Build},
)
