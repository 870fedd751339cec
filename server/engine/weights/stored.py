"""Read the headers of all files of a VAE, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...model_info import Direction
from .headers import Header, StoredTensor, UnreadableWeights, read_header
from .tensor_names import vae_names

OTHER_PARTS = {
    Direction.DECODE: ("encoder", "quant_conv", "pre_block", "mean_proj", "logs_proj"),
    Direction.ENCODE: ("decoder", "post_quant_conv", "dec_in_proj"),
}
"""For each direction, the modules of a diffusers VAE that it does not use."""

OWN_PART = {Direction.DECODE: "decoder.", Direction.ENCODE: "encoder."}
"""For each direction, how the names of its own tensors begin. A file of one direction may have `quant_conv` of both."""


NAMES_SHOWN = 3
NOT_A_VAE = {
    "lora": "a LoRA",
    "model.diffusion_model.": "a diffusion model without its VAE",
    "double_blocks.": "a diffusion model",
    "joint_blocks.": "a diffusion model",
    "transformer_blocks.": "a diffusion model",
    "text_model.": "a text encoder",
    "self_attn.q_proj.": "a language model",
}
"""Parts of the names of tensors in files that people mistake for a VAE, and what these files are."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The headers of all files of a VAE, or of the checkpoint that contains it.

    tensors: each tensor of the VAE by its name without the prefix of a checkpoint: its file, its name there, its
        dtype and shape.
    others: the names of all other tensors. metadata: of all files together.
    """

    tensors: Mapping[str, tuple[Path, str, StoredTensor]]
    others: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of the first file, for messages."""
        return next(iter(self.tensors.values()))[0].name if self.tensors else "the file"


def read_stored(paths: Sequence[Path], index: Path | None = None) -> Stored:
    """Read the headers of all files. Raises UnreadableWeights if one is damaged, or if the index does not fit them."""
    headers = [read_header(path) for path in paths]
    places = {key: (header.path, key, tensor) for header in headers for key, tensor in header.tensors.items()}
    if index is not None:
        _check_index(index, headers)
    names = vae_names(places)
    metadata = {key: text for header in headers for key, text in header.metadata.items()}
    kept = {name: places[key] for name, key in names.items()}
    if not kept:
        raise UnreadableWeights(f"{paths[0].name} contains no tensors; download it again")
    return Stored(kept, frozenset(places) - frozenset(names.values()), metadata)


def _check_index(index: Path, headers: Iterable[Header]) -> None:
    """Raise UnreadableWeights unless every tensor is in the file that the index names."""
    try:
        told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {(str(key), str(file)) for key, file in told.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UnreadableWeights(f"{index.name} is damaged; download it again") from None
    found = {(key, header.path.name) for header in headers for key in header.tensors}
    if missing := sorted(wanted - found):
        key, file = missing[0]
        raise UnreadableWeights(f"{index.name} says that {key} is in {file}, and it is not; download the model again")


def mistaken_for_a_vae(stored: Stored) -> str | None:
    """Return a sentence that says what a file is that people mistake for a VAE; None if it may be a VAE."""
    names = [*(key for _, key, _ in stored.tensors.values()), *stored.others]
    is_vae = any(name.startswith(("encoder.", "decoder.", "first_stage_model.", "vae.")) for name in names)
    known = next((what for part, what in NOT_A_VAE.items() if any(part in name for name in names)), None)
    if known is None or is_vae:
        return None
    return f"{stored.file} is {known} ({some(names)}); give the file of its VAE"


def some(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
