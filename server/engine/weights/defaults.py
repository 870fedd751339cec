"""Complete a config.json by the defaults of its diffusers class.

The defaults are read from the source of the class, because an import of diffusers and torch takes seconds, and the
command `models` should not need any.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# The tiny video VAEs, which diffusers does not have, are in this file.
TINY_SOURCE = Path(__file__).resolve().parent.parent / "coders" / "video" / "tiny_layers.py"
TINY_CLASSES = ("TAEHV", "TAELTX", "TAECVX", "TAEH3")
# The files of diffusers with classes of VAEs, and with the vocoders that the VAEs of LTX-2's audio need.
PATTERNS = ("models/autoencoders/*.py", "pipelines/ltx2/vocoder.py")

_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:.*\n(?:[ \t].*\n|\n|\).*\n)*", re.MULTILINE)


class _Source(NamedTuple):
    """A class in a source file. bases: the names of its bases. text: its definition."""

    file: Path
    bases: tuple[str, ...]
    text: str


@cache
def _sources() -> Mapping[str, _Source]:
    """Return all classes in diffusers' files, and those of the tiny video VAEs, by name."""
    spec = find_spec("diffusers")
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    files = [TINY_SOURCE, *(file for folder in folders for each in PATTERNS for file in sorted(folder.glob(each)))]
    return {
        found[1]: _Source(file, tuple(re.findall(r"\w+", found[2] or "")), found[0])
        for file in files
        for found in _CLASS.finditer(file.read_text(encoding="utf-8"))
    }


@cache
def _exported() -> frozenset[str]:
    """Return the words of diffusers' __init__.py, among them the names of all classes that it exports."""
    spec = find_spec("diffusers")
    text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return frozenset(re.findall(r'"(\w+)"', text))


def is_vae_class(class_name: str) -> bool:
    """Return whether the installed diffusers has a VAE class of this name. Older versions lack the newer VAEs."""
    is_known = class_name in TINY_CLASSES or (class_name in _exported() and class_name in _sources())
    return is_known and any("decode" in _methods(name) for name in _with_bases(class_name))


def has_class(class_name: str) -> bool:
    """Return whether the source of this class was found."""
    return class_name in _sources()


def whole_config(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config completed by the defaults of the diffusers class, as `from_config` does."""
    return {**_defaults(class_name), **config}


@cache
def _defaults(class_name: str) -> Mapping[str, Any]:
    """Return the defaults of the arguments of a class's constructor."""
    found = next((name for name in _with_bases(class_name) if "__init__" in _methods(name)), None)
    if found is None:
        return {}
    arguments, file = _methods(found)["__init__"].args, _sources()[found].file
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [
        *zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {argument.arg: _value(default, file) for argument, default in pairs if default is not None}


def _value(default: ast.expr, file: Path) -> Any:
    """Return the value of a default, which is a literal or computed from constants of its file."""
    try:
        return ast.literal_eval(default)
    except ValueError:
        code = compile(ast.Expression(default), file, "eval")
        return eval(code, {"__builtins__": {}}, _constants(file))  # noqa: S307  # installed code, which a load runs too


@cache
def _constants(file: Path) -> dict[str, Any]:
    """Return the names of a file to which a literal is assigned, with their values."""
    constants = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name):
            with suppress(ValueError):
                constants[name.id] = ast.literal_eval(node.value)
    return constants


def _with_bases(class_name: str) -> Iterator[str]:
    """Yield a class and its bases, as far as they are in the source files."""
    if source := _sources().get(class_name):
        yield class_name
        for base in source.bases:
            yield from _with_bases(base)


@cache
def _methods(class_name: str) -> Mapping[str, ast.FunctionDef]:
    """Return the methods that a class defines itself, by name."""
    (definition,) = ast.parse(_sources()[class_name].text).body
    assert isinstance(definition, ast.ClassDef)
    return {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}
