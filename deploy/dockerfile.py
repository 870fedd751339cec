"""Dockerfile and .dockerignore, read as far as this project's own use them: anything else is a DockerfileError.

Knows nothing of file systems: chroot_build.py carries the instructions out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from string import Template


class DockerfileError(ValueError):
    """The sentence names the line."""


@dataclass(frozen=True, slots=True)
class From:
    image: str


@dataclass(frozen=True, slots=True)
class Arg:
    name: str
    default: str


@dataclass(frozen=True, slots=True)
class Env:
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    script: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A target that ends in `/` is a folder that takes the sources; else it is the one source's own new path."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Workdir:
    path: str


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Volume:
    path: str


@dataclass(frozen=True, slots=True)
class Expose:
    port: int


@dataclass(frozen=True, slots=True)
class Healthcheck:
    interval_s: int
    timeout_s: int
    start_period_s: int
    retries: int
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cmd:
    argv: tuple[str, ...]


Instruction = From | Arg | Env | Run | Copy | Workdir | User | Volume | Expose | Healthcheck | Cmd


def parse(text: str) -> list[Instruction]:
    """Raises DockerfileError at the first thing that is not known here."""
    instructions: list[Instruction] = []
    for line, statement in _statements(text):
        keyword, _, rest = statement.partition(" ")
        try:
            if keyword not in READERS:
                raise ValueError(f"unknown instruction; known: {', '.join(READERS)}")
            instructions.append(READERS[keyword](rest.strip()))
        except ValueError as error:
            raise DockerfileError(f"line {line}: {keyword}: {error}") from None
    if not instructions or not isinstance(instructions[0], From):
        raise DockerfileError("line 1: the first instruction must be FROM")
    return instructions


def _statements(text: str) -> list[tuple[int, str]]:
    """Line number and text of each instruction: comments dropped, continued lines joined."""
    statements: list[tuple[int, str]] = []
    is_open = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        content = line.strip() if not is_open else line
        if is_open:
            first, so_far = statements.pop()
            number, content = first, so_far + content
        is_open = content.endswith("\\")
        statements.append((number, content.removesuffix("\\")))
    return statements


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}`. Raises DockerfileError for a name without a value and for `${NAME:-…}`."""
    try:
        return Template(text).substitute(variables)
    except (KeyError, ValueError) as error:
        raise DockerfileError(f"cannot expand {text!r}: {error}") from None


def _from(text: str) -> From:
    return From(_match(r"\S+", text, "an image, without flags and without AS")[0])


def _arg(text: str) -> Arg:
    found = _match(r"(\w+)=(.*)", text, "NAME=default")
    return Arg(found[1], "".join(shlex.split(found[2])))


def _env(text: str) -> Env:
    pairs = [word.partition("=") for word in shlex.split(text)]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise ValueError("expected NAME=value …")
    return Env({name: value for name, _, value in pairs})


def _run(text: str) -> Run:
    if not text or text.startswith(("-", "[", "<<")):
        raise ValueError("expected a shell command, without flags, exec form or here-document")
    return Run(text)


def _copy(text: str) -> Copy:
    words = text.split()
    if len(words) < 2 or any(word.startswith(("-", "[", "<<", "/", "../")) or "*" in word for word in words[:-1]):
        raise ValueError("expected paths of the context and a target, without flags and wildcards")
    if len(words) > 2 and not words[-1].endswith("/"):
        raise ValueError("the target of several sources must end in /")
    return Copy(tuple(words[:-1]), words[-1])


def _workdir(text: str) -> Workdir:
    return Workdir(_match(r"/\S*", text, "an absolute path")[0])


def _user(text: str) -> User:
    found = _match(r"(\d+):(\d+)", text, "uid:gid in numbers")
    return User(int(found[1]), int(found[2]))


def _volume(text: str) -> Volume:
    return Volume(_match(r"/\S+", text, "one absolute path")[0])


def _expose(text: str) -> Expose:
    return Expose(int(_match(r"\d+", text, "one port")[0]))


def _healthcheck(text: str) -> Healthcheck:
    pattern = r"--interval=(\d+)s --timeout=(\d+)s --start-period=(\d+)s --retries=(\d+) CMD (.*)"
    found = _match(pattern, text, '--interval=…s --timeout=…s --start-period=…s --retries=… CMD ["…"]')
    interval_s, timeout_s, start_period_s, retries = map(int, found.groups()[:4])
    return Healthcheck(interval_s, timeout_s, start_period_s, retries, _exec_form(found[5]))


def _cmd(text: str) -> Cmd:
    return Cmd(_exec_form(text))


def _exec_form(text: str) -> tuple[str, ...]:
    try:
        words = json.loads(text)
    except json.JSONDecodeError:
        words = None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError('expected the exec form, ["program", "argument"]: a shell in between would take the signals')
    return tuple(words)


def _match(pattern: str, text: str, expected: str) -> re.Match[str]:
    if not (found := re.fullmatch(pattern, text)):
        raise ValueError(f"expected {expected}, got {text!r}")
    return found


READERS: Mapping[str, Callable[[str], Instruction]] = {
    "FROM": _from,
    "ARG": _arg,
    "ENV": _env,
    "RUN": _run,
    "COPY": _copy,
    "WORKDIR": _workdir,
    "USER": _user,
    "VOLUME": _volume,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "CMD": _cmd,
}


class Ignored:
    """The patterns of a .dockerignore."""

    def __init__(self, text: str) -> None:
        """Raises DockerfileError."""
        lines = [line.strip() for line in text.splitlines()]
        patterns = [line for line in lines if line and not line.startswith("#")]
        self._rules = [(_pattern(line.removeprefix("!")), not line.startswith("!")) for line in patterns]

    def covers(self, path: PurePosixPath) -> bool:
        """path: relative to the context. The last pattern that matches it, or a folder above it, decides."""
        names = [str(part) for part in (path, *path.parents) if part.name]
        matches = [is_ignored for pattern, is_ignored in self._rules if any(map(pattern.fullmatch, names))]
        return bool(matches) and matches[-1]


def _pattern(text: str) -> re.Pattern[str]:
    if re.search(r"[\[\]\\]|[^/]\*\*|\*\*[^/]", text):
        raise DockerfileError(f".dockerignore: {text}: only *, ? and **/ are known here")
    wildcards = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?)", text.strip("/"))
    return re.compile("".join(wildcards.get(part, re.escape(part)) for part in parts))
