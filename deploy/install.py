"""Install what serving needs into a virtual environment. It says first what that is and how large it is.

    python3 -m deploy.install .venv [--port-from VARIABLE]

With `--port-from`, the port that `serve` would listen on with the arguments in this variable is checked first.
`TORCH_INDEX_URL` adds a package index for torch, such as the one with builds for CPUs that torch's install page names.
Needs only Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("-r", str(REPOSITORY / "requirements.txt"), "-c", str(REPOSITORY / "constraints.txt"))
OLDEST_PYTHON = (3, 11)
PORT = 8000
HEAD_TIMEOUT_S = 10.0
MEGA = 1e6
# How much larger the packages are on the disk than their files, measured with torch 2.13 for CPUs. CUDA's libraries are
# compressed less.
UNPACKED, UNPACKED_CUDA = 3.9, 2.2


def main() -> int:
    """Run the program from the command line. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="folder of the virtual environment; it is made if it does not exist")
    parser.add_argument("--port-from", default=None, help="name of the variable with the arguments of `serve`")
    arguments = parser.parse_args()
    problem = python_problem() or (
        None if arguments.port_from is None else port_problem(os.environ.get(arguments.port_from, ""))
    )
    if problem:
        print(problem, file=sys.stderr)
        return 1
    return install(arguments.venv)


def python_problem() -> str | None:
    """Return why this Python cannot be used; None if it can."""
    if sys.version_info < OLDEST_PYTHON:
        return "Python 3.11 or newer is needed; name one: make serve PYTHON=python3.12"
    try:
        import ensurepip  # noqa: F401  # Debian has it in a package of its own
        import venv  # noqa: F401  # likewise
    except ImportError:
        return "Python's venv is missing: apt-get install python3-venv"
    return None


def port_problem(arguments: str) -> str | None:
    """Return why the port that `serve` with these arguments wants is not free; None if it is."""
    host, port = address_of(arguments)
    if not port:
        return None
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except OSError as error:
        reason = f"port {port} of {host} cannot be used ({os.strerror(error.errno or 0)})"
        return f'{reason}; choose another one: make serve ARGS="--port {port + 1}"'


def address_of(arguments: str) -> tuple[str, int]:
    """Return the host and the port that `serve` would listen on. Values that it would refuse give port 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=os.environ.get("VAE_SERVER_HOST", "127.0.0.1"))
    parser.add_argument("--port", default=os.environ.get("VAE_SERVER_PORT", str(PORT)))
    known, _ = parser.parse_known_args(shlex.split(arguments))
    return known.host, int(known.port) if known.port.isdecimal() and int(known.port) < 1 << 16 else 0


def install(folder: Path) -> int:
    """Make the environment and install the packages. Return pip's exit status."""
    began = time.monotonic()
    if not (folder / "bin" / "python").exists():
        print(f"making a virtual environment in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    url = os.environ.get("TORCH_INDEX_URL")
    index = ["--extra-index-url", url] if url else []
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    print("looking up which packages are needed", flush=True)
    dry = [*pip, "install", "--quiet", "--dry-run", "--report", "-", *index, *REQUIREMENTS]
    found = subprocess.run(dry, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        return found.returncode
    packages = json.loads(found.stdout)["install"]
    if packages:
        print(summary(packages, folder), flush=True)
        names = [f"{package['metadata']['name']}=={package['metadata']['version']}" for package in packages]
        # The first start compiles the modules that it imports in 6 s; pip would compile all of them in 27 s.
        command = [*pip, "install", "--no-deps", "--no-compile", *index, *names]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    print(f"the packages are installed, after {time.monotonic() - began:.0f} s", flush=True)
    return 0


def summary(packages: Sequence[dict[str, Any]], folder: Path) -> str:
    """Say how many packages will be installed, how large they are, and which build of torch is among them."""
    with ThreadPoolExecutor(16) as threads:
        sizes = list(threads.map(lambda package: size_of(package["download_info"]["url"]), packages))
    total = sum(size for size in sizes if size is not None)
    least = "at least " if None in sizes else ""
    torch = [package for package in packages if package["metadata"]["name"] == "torch"]
    builds = [build_of(package["metadata"]) for package in torch]
    unpacked = (UNPACKED_CUDA if "CUDA GPUs" in builds else UNPACKED) * total
    lines = [
        f"{len(packages)} packages, {least}{total / MEGA:.0f} MB to download unless they are cached, about "
        f"{unpacked / MEGA:.0f} MB in {folder}"
    ]
    for package, build in zip(torch, builds, strict=True):
        other = "CPUs" if build == "CUDA GPUs" else "other devices"
        lines.append(
            f"torch {package['metadata']['version']} for {build}; a build for {other}: "
            "TORCH_INDEX_URL=… make serve, with the index that torch's install page lists"
        )
    return "\n".join(lines)


def build_of(metadata: dict[str, Any]) -> str:
    """Return what a build of torch is for, by its version and by what it requires."""
    local = metadata["version"].partition("+")[2]
    needs = " ".join(metadata.get("requires_dist", ()))
    if local.startswith("rocm"):
        return "ROCm GPUs"
    if local.startswith("cu") or (not local and any(name in needs for name in ("nvidia-", "cuda-"))):
        return "CUDA GPUs" if sys.platform == "linux" or local else "CPUs and Apple GPUs"
    return "CPUs and Apple GPUs" if sys.platform == "darwin" else "CPUs"


def size_of(url: str) -> int | None:
    """Return the size of a package's file in bytes; None if the index does not tell."""
    try:
        if url.startswith("file:"):
            return Path(unquote(urlsplit(url).path)).stat().st_size
        with urlopen(Request(url, method="HEAD"), timeout=HEAD_TIMEOUT_S) as answer:  # noqa: S310  # pip chose the url
            length = answer.headers["Content-Length"]
            return int(length) if length else None
    except (OSError, ValueError, HTTPException):
        return None


if __name__ == "__main__":
    sys.exit(main())
