"""Choose the files of the weights among the names in a folder or a repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .headers import PICKLES, SAFE_ONLY, SAVE_AGAIN, UnreadableWeights

SUFFIX = ".safetensors"
INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.\w+)?\.json$")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
USUAL_STEMS = ("diffusion_pytorch_model", "model")  # of diffusers, and of transformers
PARTIAL = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
NAMES_SHOWN = 4


def choose_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the safetensors files that together are the weights, in the order of their shards.

    The order of preference: `diffusion_pytorch_model`, `model`, the only variant of either (such as
    `diffusion_pytorch_model.fp16`), the only other file. Of each, one file is preferred to shards. Two files whose
    names differ only in `encoder` and `decoder` are taken together.

    names: of all files in the folder. Raises UnreadableWeights if no files, or several, could be meant.
    """
    names = sorted(names)
    sets = _sets(names)
    for stem in USUAL_STEMS:
        if stem in sets:
            return sets[stem]
    if not sets and (indexes := [name for name in names if INDEX.match(name)]):
        raise UnreadableWeights(f"it has {indexes[0]} and none of the files that it lists; download the model again")
    variants = [stem for stem in sets if stem.startswith(tuple(f"{usual}." for usual in USUAL_STEMS))]
    possible = variants or list(sets)
    if len(possible) == 1:
        return sets[possible[0]]
    if len(possible) == 2 and len({re.sub("encoder|decoder", "", stem) for stem in possible}) == 1:
        return sets[possible[0]] + sets[possible[1]]
    if possible:
        files = _listed([sets[stem][0] for stem in possible])
        raise UnreadableWeights(f"it has several files of weights ({files}); give the path of one, or its name as file")
    raise UnreadableWeights(_none(names))


def index_of(files: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the name of the index that belongs to these shards; None if there is none."""
    if not (shard := SHARD.match(files[0])):
        return None
    found = {
        match["stem"] + (match["variant"] or ""): name for name in names if (match := INDEX.match(name)) is not None
    }
    return found.get(shard["stem"])


def _sets(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the files by stem: one file, or all its shards. Raises UnreadableWeights if a shard is missing."""
    shards: dict[str, dict[int, str]] = {}
    single: dict[str, tuple[str, ...]] = {}
    counts: dict[str, int] = {}
    for name in names:
        if match := SHARD.match(name):
            shards.setdefault(match["stem"], {})[int(match["number"])] = name
            counts[match["stem"]] = int(match["count"])
        elif name.endswith(SUFFIX):
            single[name.removesuffix(SUFFIX)] = (name,)
    for stem, found in shards.items():
        if stem in single:
            continue
        missing = [number for number in range(1, counts[stem] + 1) if number not in found]
        if missing:
            name = f"{stem}-{missing[0]:05}-of-{counts[stem]:05}{SUFFIX}"
            raise UnreadableWeights(
                f"{name} is missing, one of the {counts[stem]} files of its weights; download the model again"
            )
        single[stem] = tuple(found[number] for number in sorted(found))
    return single


def _none(names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    partial = [name for name in names if name.endswith(PARTIAL)]
    if pickles:
        return f"it has only pickle weights ({_listed(pickles)}) and {SAFE_ONLY}; {SAVE_AGAIN}"
    if partial:
        return f"the download of {partial[0]} was not finished; download the model again"
    return f"it has no {USUAL_STEMS[0]}{SUFFIX} and no other safetensors file; {SAFE_ONLY}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
