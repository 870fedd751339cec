"""Compare what the headers of weights contain with what a diffusers class and its config.json ask for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import accelerate
import diffusers
import torch

from ...model_info import Direction
from ..coders.video.tiny_layers import TINY_CLASSES
from .headers import StoredTensor, UnreadableWeights
from .key_maps import Tensors, to_diffusers
from .stored import OTHER_PARTS, OWN_PART, Stored, mistaken_for_a_vae, some

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


def vae_class(class_name: str) -> Any:
    """Return the class of this name: one of diffusers', or of the tiny video VAEs, which diffusers does not have."""
    return TINY_CLASSES.get(class_name) or getattr(diffusers, class_name)


def without_data(stored: Stored) -> Tensors:
    """Return the tensors on the device `meta`, where they have a shape and no values."""
    return {name: _meta(tensor) for name, (_, _, tensor) in stored.tensors.items()}


def _meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.uint8), device="meta")


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
    found = translated(vae, without_data(stored), config)
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
    if other := mistaken_for_a_vae(stored):
        return other
    names = [key for _, key, _ in stored.tensors.values()]
    return (
        f"the tensors of {stored.file} ({some(names)}) are of another architecture than {type(vae).__name__}, "
        f"which {origin} names; give the config of this file, or the file of this config"
    )
