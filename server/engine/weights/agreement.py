"""Compare what the headers of weights contain with what a diffusers class and its config.json ask for."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch

from ...model_info import Direction
from .defaults import vae_class
from .headers import Header, StoredTensor, UnreadableWeights, read_header
from .key_maps import Tensors, to_diffusers, vae_names

OTHER_PARTS = {
    Direction.DECODE: ("encoder", "quant_conv", "pre_block", "mean_proj", "logs_proj"),
    Direction.ENCODE: ("decoder", "post_quant_conv", "dec_in_proj"),
}
"""For each direction, the modules of a diffusers VAE that it does not use."""

OWN_PART = {Direction.DECODE: "decoder.", Direction.ENCODE: "encoder."}
"""For each direction, how the names of its own tensors begin. A file of one direction may have `quant_conv` of both."""

# While diffusers builds a module without memory, it patches torch's modules. Two builds at the same time would leave
# them patched forever.
BUILDING = threading.Lock()

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of weights that can be converted to a dtype in which a VAE runs, without other tensors."""

SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8", "comfy_quant", "weight_scale_inv")
"""The last segments of the names of tensors that quantized weights must be multiplied by."""

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

    def without_data(self) -> Tensors:
        """Return the tensors on the device `meta`, where they have a shape and no values. Raises UnreadableWeights."""
        return {name: _meta(path, tensor) for name, (path, _, tensor) in self.tensors.items()}


def _meta(path: Path, tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.uint8), device="meta")


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


def skeleton(made: Any, config: Mapping[str, Any], origin: str) -> torch.nn.Module:
    """Return the module of a config, without memory for its weights.

    made: the class, or the name of a class of VAEs.
    origin: where the config comes from, for messages. Raises UnreadableWeights if the config is not one of the class.
    """
    made = vae_class(made) if isinstance(made, str) else made
    try:
        with BUILDING, accelerate.init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers uses functions that torch will remove
            module: torch.nn.Module = made.from_config(dict(config))
    except Exception as error:  # whatever the constructor of a class raises for values that it was not written for
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise UnreadableWeights(f"{origin} does not describe a {made.__name__} ({reason})") from error
    return module


def translated(vae: torch.nn.Module, tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Return the tensors under the names of the module: as they are, or translated if that fits better.

    config: the config.json, completed by the defaults of the class.
    """
    wanted = vae.state_dict().keys()
    own = dict(tensors)
    vae._fix_state_dict_keys_on_load(own)  # type: ignore[operator]  # the names of attentions before diffusers 0.17
    if any(not _missing(vae, own, direction) for direction in Direction):
        return own
    try:
        other = to_diffusers(type(vae).__name__, tensors, config)
    except (KeyError, ValueError, IndexError, RuntimeError, AttributeError):
        return own
    return other if len(other.keys() & wanted) > len(own.keys() & wanted) else own


def directions_in(
    vae: torch.nn.Module, stored: Stored, config: Mapping[str, Any], origin: str, *, may_have_more: bool
) -> tuple[Direction, ...]:
    """Return the directions for which the files contain all tensors, in the shapes that the module needs.

    vae: from `skeleton`. config: completed by the defaults of the class. origin: where the config comes from, for
    messages, such as `its config.json`. may_have_more: the encoder and the decoder may have tensors in the files that
    the module does not have. Without the config of their author, these are a sign that it is another model.

    Raises UnreadableWeights if there is none, if a direction is incomplete, or if a tensor has another shape or a
    dtype that cannot be used.
    """
    _check_dtypes(stored)
    found = translated(vae, stored.without_data(), config)
    names = [name for name, _ in _floats(vae)]
    if not any(name in found for name in names):
        raise UnreadableWeights(_of_another_architecture(vae, stored, origin))
    _check_shapes(vae, found, stored, origin)
    more = [name for name in found if name.startswith(tuple(OWN_PART.values())) and name not in vae.state_dict()]
    if more and not may_have_more:
        raise UnreadableWeights(
            f"{stored.file} has {some(more)}, which {origin} does not know; do both belong to the same model?"
        )
    complete = []
    for direction in Direction:
        missing = _missing(vae, found, direction)
        own = [name for name in names if name.startswith(OWN_PART[direction])]
        is_absent = bool(own) and not any(name in found for name in own)
        if missing and not is_absent:
            raise UnreadableWeights(
                f"the weights lack {some(missing)}, which {origin} asks for; do both belong to the same model?"
            )
        if not missing:
            complete.append(direction)
    if not complete:
        raise UnreadableWeights(_of_another_architecture(vae, stored, origin))
    return tuple(complete)


def _floats(vae: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors that a file must contain. Integers, such as the counter of a batch norm, are not used."""
    return [(name, tensor) for name, tensor in vae.state_dict().items() if tensor.is_floating_point()]


def _missing(vae: torch.nn.Module, found: Tensors, direction: Direction) -> list[str]:
    """Return the names of the tensors that a direction needs and that were not found."""
    names = [name for name, _ in _floats(vae) if name.split(".")[0] not in OTHER_PARTS[direction]]
    return [name for name in names if name not in found]


def _check_shapes(vae: torch.nn.Module, found: Tensors, stored: Stored, origin: str) -> None:
    for name, tensor in _floats(vae):
        if name in found and found[name].shape != tensor.shape:
            shapes = "x".join(map(str, found[name].shape)), "x".join(map(str, tensor.shape))
            raise UnreadableWeights(
                f"{name} in {stored.file} has the shape {shapes[0]}, and {origin} asks for {shapes[1]}; "
                "do both belong to the same model?"
            )


def _check_dtypes(stored: Stored) -> None:
    """Raise UnreadableWeights for quantized weights, which are numbers only together with other tensors."""
    for name, (path, _, tensor) in stored.tensors.items():
        if name.rsplit(".", 1)[-1] in SCALES:
            raise UnreadableWeights(
                f"{path.name} has scaled {_quantized(stored)} weights ({name}), which this server does not read; "
                "use the file of the same VAE in float16, bfloat16 or float32"
            )
        if name.endswith((".weight", ".bias")) and tensor.dtype not in DTYPES:
            raise UnreadableWeights(
                f"{path.name} has {name} as {tensor.dtype}, which is quantized, and this server does not read that; "
                "use the file of the same VAE in float16, bfloat16 or float32"
            )


def _quantized(stored: Stored) -> str:
    found = {tensor.dtype for _, _, tensor in stored.tensors.values()}
    return "fp8" if any(dtype.startswith("F8") for dtype in found) else "quantized"


def _of_another_architecture(vae: torch.nn.Module, stored: Stored, origin: str) -> str:
    names = [key for _, key, _ in stored.tensors.values()]
    known = next((what for part, what in NOT_A_VAE.items() if any(part in name for name in names)), None)
    if known:
        return f"{stored.file} is {known} ({some(names)}); give the file of its VAE"
    return (
        f"the tensors of {stored.file} ({some(names)}) are of another architecture than {type(vae).__name__}, "
        f"which {origin} names; give the config of this file, or the file of this config"
    )


def some(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
