"""Describe a model from its config.json and models.yaml, before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from math import prod
from typing import Any

from ...config import ModelEntry
from ...errors import ModelUnavailable
from ...families import FAMILIES, Family, family_of_class, plain_family
from ...model_info import Direction, LatentSpec, ModelInfo, Weights
from ...values import ITEM_BYTES
from .defaults import is_vae_class, whole_config
from .headers import UnreadableWeights
from .hub import Source
from .stored import OTHER_PARTS, OWN_PART, Stored, read_stored
from .which_config import Configuration, companion_config, configuration_of

log = logging.getLogger(__name__)


def read_info(source: Source, *, is_local_only: bool = False) -> ModelInfo:
    """Return the description of a model.

    is_local_only: do not use the network. For a well-known checkpoint whose config.json is not on this machine, the
        facts of known.yaml take its place, and `is_assumed` is set.
    Raises ModelUnavailable if nothing tells the configuration, or if this server cannot run the VAE that it describes.
    """
    name, entry = source.name, source.entry
    checkpoint = source.checkpoint()
    is_assumed = False
    try:
        found = configuration_of(source, is_local_only=is_local_only)
    except ModelUnavailable:
        if not (is_local_only and checkpoint):
            raise
        assumed = {"_class_name": checkpoint.class_name, **checkpoint.config}
        found, is_assumed = Configuration(assumed, "the list of well-known checkpoints"), True
    config, class_name = found.values, found.class_name
    if not is_vae_class(class_name):
        sentence = f"{name} ({source.label}): this diffusers ({version('diffusers')}) has no VAE class {class_name}"
        if is_assumed:  # log the reason, because otherwise the model would only be missing in the list
            log.warning("%s", sentence)
        raise ModelUnavailable(name, sentence)
    family = _family(name, entry.model_copy(update={"family": entry.family or found.family}), class_name, config)
    beside: dict[str, Any] = {}
    if companion := family.companion:
        known = checkpoint.companion if is_assumed and checkpoint else None
        beside[companion] = known or companion_config(source, companion, is_local_only=is_local_only)
    try:
        whole = whole_config(class_name, config) | beside
        spec: LatentSpec = family.describe(whole)
        check_spec(spec)
        if entry.custom_decoder and spec.kind == "audio":
            raise ValueError("a decoder of another package can only be one of images or videos")
        if entry.custom_decoder:
            spec = replace(spec, takes_timestep=False, takes_seed=False)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise ModelUnavailable(
            name, f"{name} ({source.label}): {found.origin} is not one of {class_name}: {reason}"
        ) from None
    return ModelInfo(
        name=name,
        latents=spec,
        limits=entry.limits,
        class_name=class_name,
        is_assumed=is_assumed,
        licence=checkpoint.licence if checkpoint else None,
        is_gated=checkpoint is not None and checkpoint.gated,
        directions=tuple(Direction) if spec.has_encoder else (Direction.DECODE,),
        config={key: value for key, value in whole.items() if not key.startswith("_")},
    )


def components(source: Source) -> tuple[Source, ...]:
    """Return the sources of everything that a model needs: its VAE, and the companion of its family.

    Raises ModelUnavailable.
    """
    companion = FAMILIES[read_info(source).latents.family].companion
    return (source, source.beside(companion)) if companion else (source,)


def weigh(source: Source, dtype: str | None) -> Weights:
    """Return the size of the weights on disk, and of each direction in memory.

    dtype: the dtype in which the model will be loaded; None if only the device tells it. Sizes of a model that is
    neither on this machine nor well known are None.
    """
    item_bytes = ITEM_BYTES[dtype or "float32"]
    if source.is_here():
        files = source.files(is_local_only=True)
        try:
            stored = read_stored(files.weights)
        except (UnreadableWeights, OSError):
            return Weights(True, dtype)
        encoder, decoder = _count(stored)
        disk_mb = sum(path.stat().st_size for path in files.weights) >> 20
        return Weights(True, dtype, disk_mb, decoder * item_bytes >> 20, encoder * item_bytes >> 20)
    checkpoint = source.checkpoint()
    if checkpoint is None:
        return Weights(False, dtype)
    counts = checkpoint.decoder_weights, checkpoint.encoder_weights
    disk_mb = sum(counts) * ITEM_BYTES["float32"] >> 20
    return Weights(False, dtype, disk_mb, *(count * item_bytes >> 20 for count in counts))


def _count(stored: Stored) -> tuple[int, int]:
    """Return the parameter counts of the encoder and the decoder."""
    encoder = decoder = 0
    for name, (_, _, tensor) in stored.tensors.items():
        is_encoder = name.split(".")[0] in OTHER_PARTS[Direction.DECODE]
        encoder, decoder = encoder + prod(tensor.shape) * is_encoder, decoder + prod(tensor.shape) * (not is_encoder)
    return encoder, decoder


def directions_of(source: Source) -> tuple[Direction, ...]:
    """Return the directions that the weights on this machine contain; both if there are none here, or damaged ones.

    This looks only at the names. `loading.check_weights` compares the weights with the config. A decoder of another
    package only decodes.
    """
    if source.entry.custom_decoder:
        return (Direction.DECODE,)
    try:
        files = source.files(is_local_only=True)
        stored = read_stored(files.weights)
    except (ModelUnavailable, UnreadableWeights, OSError):
        return tuple(Direction)
    found = [each for each in Direction if any(name.startswith(OWN_PART[each]) for name in stored.tensors)]
    return tuple(found or Direction)


def check_spec(spec: LatentSpec) -> None:
    """Check the values that requests are checked against. Raises ValueError if one is not a valid number.

    This is needed because a config.json is written by others.
    """
    whole = (spec.channels, spec.vae_scale_factor, spec.temporal_compression_ratio)
    if not all(isinstance(value, int) and value >= 1 for value in whole):
        raise ValueError("its channels and compression ratios must be whole numbers")
    if not all(isinstance(value, int | float | None) for value in (spec.scaling_factor, spec.shift_factor)):
        raise ValueError("scaling_factor and shift_factor must be numbers")
    if spec.scaling_factor == 0:
        raise ValueError("scaling_factor must not be 0")
    for statistics in (spec.latents_mean, spec.latents_std):
        if statistics is not None and len(statistics) % spec.channels:
            raise ValueError(f"latents_mean and latents_std must have {spec.channels} values, one for each channel")


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
    known = sorted({class_name for family in FAMILIES.values() for class_name in family.class_names})
    return (
        f"this server does not know the range, scaling and noise of the VAE class {class_name}, so its pixels could be "
        f"wrong; known classes: {', '.join(known)}. To serve it anyway, with diffusers' own decode and the statistics "
        "of its config.json, write `decoder: plain` into its entry of models.yaml"
    )
