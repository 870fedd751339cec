"""Write a software bill of materials in SPDX 2.3: what a server consists of, with versions and licences.

It lists the packages that requirements.txt asks for, the packages that these need, and the ffmpeg inside
imageio-ffmpeg, as they are installed in a folder of packages. A licence is what the metadata of a package declares.

`make sbom` runs this script in an environment with the packages of sbom-requirements.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path

from boolean import ParseError
from license_expression import ExpressionError, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from spdx_tools.spdx.model import (
    Actor,
    ActorType,
    Checksum,
    ChecksumAlgorithm,
    CreationInfo,
    Document,
    ExternalPackageRef,
    ExternalPackageRefCategory,
    Package,
    Relationship,
    RelationshipType,
    SpdxNoAssertion,
)
from spdx_tools.spdx.writer.write_anything import write_file

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = "vae-server"
DOCUMENT = "SPDXRef-DOCUMENT"
LICENSING = get_spdx_licensing()
# What packages without an SPDX expression write instead. The word BSD is not here, because it names several licences.
NAMES = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
FFMPEG = re.compile(r"imageio_ffmpeg/binaries/ffmpeg-\w+(?:-\w+)*?-v(?P<version>[\d.]+)(?:\.exe)?")


@dataclass(frozen=True)
class Installed:
    """An installed package, and the names of the packages that it needs."""

    distribution: Distribution
    needs: frozenset[str]


def main() -> int:
    """Run the program from the command line. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "packages", type=Path, help="the folder of the packages, such as .venv/lib/python3.11/site-packages"
    )
    parser.add_argument(
        "out", type=Path, help="the file to write: .spdx.json, .spdx.yaml, .spdx.xml, .spdx or .spdx.rdf"
    )
    arguments = parser.parse_args()
    wanted = requirements((REPOSITORY / "requirements.txt").read_text())
    found = closure(wanted, arguments.packages)
    missing = sorted(requirement.name for requirement in wanted if canonicalize_name(requirement.name) not in found)
    if missing:
        names = ", ".join(missing)
        print(f"{arguments.packages} lacks {names}; install what serving needs with `make serve`", file=sys.stderr)
        return 1
    write_file(document(found, wanted), str(arguments.out), validate=True)
    print(f"{arguments.out}: {len(found)} packages")
    return 0


def requirements(text: str) -> list[Requirement]:
    """Return the requirements of a file that apply to this Python and this machine."""
    lines = (line.strip() for line in text.splitlines())
    return [each for line in lines if line and line[0] != "#" if applies(each := Requirement(line), "")]


def applies(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement of a package with this extra applies to this Python and this machine."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def closure(wanted: list[Requirement], folder: Path) -> dict[str, Installed]:
    """Return the installed packages that are wanted, and all that these need, by their normalized names."""
    installed = {canonicalize_name(each.name): each for each in distributions(path=[str(folder)])}
    found: dict[str, Installed] = {}
    seen: set[tuple[str, str]] = set()
    queue = list(wanted)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or name not in installed:
                continue
            seen.add((name, extra))
            needed = [each for line in installed[name].requires or () if applies(each := Requirement(line), extra)]
            queue += needed
            before = found[name].needs if name in found else frozenset()
            names = before.union(canonicalize_name(each.name) for each in needed)
            found[name] = Installed(installed[name], names)
    return found


def document(found: Mapping[str, Installed], wanted: list[Requirement]) -> Document:
    """Return the bill of materials of the server and its packages."""
    version = re.search(r'^__version__ = "(.+)"$', (REPOSITORY / "server" / "__init__.py").read_text(), re.MULTILINE)
    assert version
    root = Package(id_of(ROOT), ROOT, SpdxNoAssertion(), version=version[1], files_analyzed=False)
    root.license_declared = LICENSING.parse("Apache-2.0")
    packages = [root, *(described(each.distribution) for each in found.values())]
    relationships = [Relationship(DOCUMENT, RelationshipType.DESCRIBES, root.spdx_id)]
    needs = {
        ROOT: {canonicalize_name(each.name) for each in wanted},
        **{name: each.needs for name, each in found.items()},
    }
    relationships += [
        Relationship(id_of(name), RelationshipType.DEPENDS_ON, id_of(other))
        for name, others in needs.items()
        for other in sorted(others)
        if other in found
    ]
    for ffmpeg in programs(found["imageio-ffmpeg"].distribution):
        packages.append(ffmpeg)
        relationships.append(Relationship(id_of("imageio-ffmpeg"), RelationshipType.CONTAINS, ffmpeg.spdx_id))
    creation = CreationInfo(
        spdx_version="SPDX-2.3",
        spdx_id=DOCUMENT,
        name=f"{ROOT}-{version[1]}",
        document_namespace=f"https://spdx.org/spdxdocs/{ROOT}-{version[1]}-{uuid.uuid4()}",
        creators=[Actor(ActorType.TOOL, "deploy.sbom")],
        created=datetime.now(UTC).replace(microsecond=0, tzinfo=None),
    )
    return Document(creation, packages, relationships=relationships)


def id_of(name: str) -> str:
    """Return the identifier of a package in the document."""
    return f"SPDXRef-Package-{name}"


def described(distribution: Distribution) -> Package:
    """Return the entry of an installed package."""
    name, version = canonicalize_name(distribution.name), distribution.version
    package = Package(id_of(name), distribution.name, SpdxNoAssertion(), version=version, files_analyzed=False)
    package.external_references = [
        ExternalPackageRef(
            ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
        )
    ]
    texts = list(dict.fromkeys(licence_texts(distribution)))
    for text in texts:
        try:
            package.license_declared = LICENSING.parse(NAMES.get(text, text), validate=True)
            return package
        except (ExpressionError, ParseError):
            continue
    package.license_declared = SpdxNoAssertion()
    package.license_comment = f"The package says: {', '.join(texts) or 'nothing'}"
    return package


def licence_texts(distribution: Distribution) -> Iterator[str]:
    """Yield what the metadata say of the licence, the most precise first. Some packages put a whole licence there."""
    metadata = distribution.metadata
    classifiers = [
        name.rpartition(" :: ")[2] for name in metadata.get_all("Classifier", ()) if name.startswith("License")
    ]
    for text in (metadata["License-Expression"], metadata["License"], *(classifiers if len(classifiers) == 1 else ())):
        if text and "\n" not in text:
            yield text


def programs(distribution: Distribution) -> Iterator[Package]:
    """Yield the build of ffmpeg that imageio-ffmpeg contains. It has none on machines without a wheel."""
    for file in distribution.files or ():
        if name := FFMPEG.fullmatch(file.as_posix()):
            package = Package(
                id_of("ffmpeg"), "ffmpeg", SpdxNoAssertion(), version=name["version"], files_analyzed=False
            )
            package.file_name = file.as_posix()
            digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).hexdigest()
            package.checksums = [Checksum(ChecksumAlgorithm.SHA256, digest)]
            package.license_declared = LICENSING.parse("GPL-3.0-or-later")
            package.license_comment = (
                "Built with --enable-gpl --enable-version3 and libx264; `ffmpeg -L` prints its licence."
            )
            yield package


if __name__ == "__main__":
    sys.exit(main())
