"""What config.json says of a model, before any weight is read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from ...config import ModelEntry
from ...errors import ModelUnavailable
from ...families import FAMILIES, Family, family_of_class, plain_family
from ...families.known import known
from ...model_info import Direction, LatentSpec, ModelInfo, Weights
from .hub import CONFIG, WEIGHTS, Source

log = logging.getLogger(__name__)

OTHER_PARTS = {
    Direction.DECODE: ("encoder", "quant_conv"),
    Direction.ENCODE: ("decoder", "post_quant_conv"),
}
"""The modules of a diffusers VAE that a direction does not use."""


def read_info(source: Source, *, is_local_only: bool = False) -> ModelInfo:
    """What config.json and models.yaml say, before any weight is read. Raises ModelUnavailable.

    Of a well-known checkpoint without the network, what is known of it.
    """
    name, entry = source.name, source.entry
    checkpoint = known(entry.repo, entry.subfolder) if source.local is None else None
    is_assumed = False
    try:
        config = source.config(is_local_only=is_local_only)
    except ModelUnavailable:
        if not (is_local_only and checkpoint):
            raise
        config, is_assumed = {"_class_name": checkpoint.class_name, **checkpoint.config}, True
    class_name = config["_class_name"]
    if not is_vae_class(class_name):
        sentence = f"{name} ({source.label}): this diffusers ({diffusers.__version__}) has no VAE class {class_name}"
        if is_assumed:  # a list of models without it would not say why
            log.warning("%s", sentence)
        raise ModelUnavailable(name, sentence)
    family = _family(name, entry, class_name, config)
    try:
        spec: LatentSpec = family.describe(whole_config(class_name, config))
        check_spec(spec)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise ModelUnavailable(
            name, f"{name} ({source.label}): its {CONFIG} is not one of {class_name}: {reason}"
        ) from None
    return ModelInfo(
        name=name,
        latents=spec,
        limits=entry.limits,
        class_name=class_name,
        is_assumed=is_assumed,
        licence=checkpoint.licence if checkpoint else None,
        is_gated=checkpoint is not None and checkpoint.gated,
    )


def weigh(source: Source, dtype: torch.dtype) -> Weights:
    """What the weights take on the disk, and each direction of them in memory in this dtype."""
    name = str(dtype).removeprefix("torch.")
    if source.is_here():
        folder = source.folder(is_local_only=True)
        files = [path for pattern in WEIGHTS[:2] for path in folder.glob(pattern)]
        encoder, decoder = _count(files)
        disk_mb = sum(path.stat().st_size for path in files) >> 20
        return Weights(True, name, disk_mb, decoder * dtype.itemsize >> 20, encoder * dtype.itemsize >> 20)
    checkpoint = known(source.entry.repo, source.entry.subfolder) if source.local is None else None
    if checkpoint is None:
        return Weights(False, name)
    counts = checkpoint.decoder_weights, checkpoint.encoder_weights
    disk_mb = sum(counts) * torch.float32.itemsize >> 20
    return Weights(False, name, disk_mb, *(count * dtype.itemsize >> 20 for count in counts))


def _count(files: Sequence[Path]) -> tuple[int, int]:
    """How many numbers the encoder and the decoder are, from the files' headers."""
    encoder = decoder = 0
    for path in files:
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dictionary
                count = prod(file.get_slice(key).get_shape())
                is_encoder = key.split(".")[0] in OTHER_PARTS[Direction.DECODE]
                encoder, decoder = encoder + count * is_encoder, decoder + count * (not is_encoder)
    return encoder, decoder


def whole_config(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json over the diffusers class's own defaults, as `from_config` reads it."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return defaults | dict(config)


def check_spec(spec: LatentSpec) -> None:
    """A config.json is somebody's file: what requests are checked against must be numbers. Raises ValueError."""
    whole = (spec.channels, spec.vae_scale_factor, spec.temporal_compression_ratio)
    if not all(isinstance(value, int) and value >= 1 for value in whole):
        raise ValueError("its channels and compression ratios must be whole numbers")
    if not all(isinstance(value, int | float | None) for value in (spec.scaling_factor, spec.shift_factor)):
        raise ValueError("scaling_factor and shift_factor must be numbers")
    if spec.scaling_factor == 0:
        raise ValueError("scaling_factor must not be 0")
    for statistics in (spec.latents_mean, spec.latents_std):
        if statistics is not None and len(statistics) % spec.channels:
            raise ValueError(f"latents_mean and latents_std must have {spec.channels} values, one a channel")


def is_vae_class(class_name: str) -> bool:
    """Whether this diffusers has it: an older one lacks the newer VAEs."""
    found = getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        return False  # also the stand-ins of classes whose packages are missing, which raise when they are looked at
    return hasattr(found, "decode") and hasattr(found, "from_pretrained")


def _family(name: str, entry: ModelEntry, class_name: str, config: Mapping[str, Any]) -> Family:
    if entry.decoder == "plain":
        implied = plain_family(whole_config(class_name, config))
    elif (found := family_of_class(class_name)) is not None:
        implied = found
    else:
        raise ModelUnavailable(name, f"{name}: {_unknown_class(class_name)}")
    if entry.family is None:
        return implied
    chosen = FAMILIES.get(entry.family)
    if chosen is None:
        raise ModelUnavailable(name, f"{name}: unknown family '{entry.family}'; known: {', '.join(FAMILIES)}")
    if class_name not in chosen.class_names and chosen is not implied:
        raise ModelUnavailable(name, f"{name}: family '{entry.family}' does not fit a {class_name}; leave family out")
    return chosen


def _unknown_class(class_name: str) -> str:
    known = sorted(class_name for family in FAMILIES.values() for class_name in family.class_names)
    return (
        f"the VAE class {class_name} is not one whose range, scaling and noise this server knows, so its pixels could "
        f"be wrong; known classes: {', '.join(known)}. To serve it all the same, with diffusers' own decode and the "
        "statistics of its config.json, write `decoder: plain` into its entry of models.yaml"
    )
