"""Find the configuration of a VAE: from models.yaml, its config.json, the metadata of its file, or its tensors.

The weights of different models may look alike and be scaled differently. So nothing is guessed: where more than one
configuration is possible, the model is refused, and the sentence offers them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ModelUnavailable
from ...families import FAMILIES, family_of_class
from ...families.named import NamedConfig, named_config, named_configs
from .defaults import has_class, is_vae_class, whole_config
from .headers import UnreadableWeights
from .hub import CONFIG, Source
from .stored import Stored, mistaken_for_a_vae, read_stored
from .tensor_names import form_of

ARCHITECTURES = {
    "stable-diffusion-xl": "sd-xl",
    "stable-diffusion-v1": "sd-v1",
    "stable-diffusion-v2": "sd-v1",
    "stable-diffusion-v3": "sd3",
    "flux-1": "flux",
    "flux-2": "flux-2",
}
"""How `modelspec.architecture` begins in the metadata of a file, and the configuration that it means."""

MODELS = {
    "conditioner.embedders.": "sd-xl",
    "cond_stage_model.": "sd-v1",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux",
}
"""How the names of other tensors of a whole checkpoint begin, and the configuration of the VAE of such a checkpoint."""

OTHER_SCALING = "edm_mean"  # the tensor by which Playground 2.5 says that it scales the latents in its own way


COMPANIONS = ("LTX2Vocoder", "LTX2VocoderWithBWE")
"""The classes that the companion of a VAE may have. Older versions of diffusers lack some."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration of a model.

    values: a config.json, with `_class_name`. origin: where it comes from, for messages. family: the name of a family,
    if the class does not tell it.
    """

    values: Mapping[str, Any]
    origin: str
    family: str | None = None

    @property
    def is_of_the_author(self) -> bool:
        """Whether it came with the weights."""
        return self.origin == f"its {CONFIG}"

    @property
    def class_name(self) -> str:
        """The diffusers class."""
        return str(self.values["_class_name"])


def configuration_of(source: Source, *, is_local_only: bool = False) -> Configuration:
    """Return the configuration of a model. Weights are downloaded if nothing else tells it, unless `is_local_only`.

    Raises ModelUnavailable if there is none, or if it is not clear which one it is.
    """
    if (given := source.given_config()) is not None:
        return Configuration(given, "the file that config names")
    if word := source.entry.config:
        if (found := named_config(word)) is None:
            raise source.failure(f"config: there is no configuration '{word}'; known: {_all_names()}")
        return _named(found, f"config: {word}")
    if (beside := source.config(is_local_only=is_local_only)) is not None:
        return Configuration(beside, f"its {CONFIG}")
    files = source.files(is_local_only=is_local_only)
    try:
        stored = read_stored(files.weights, files.index)
        return _told_by(stored.metadata) or _decided(stored)
    except (UnreadableWeights, OSError) as error:
        raise source.failure(str(error)) from None


def companion_config(source: Source, name: str, *, is_local_only: bool = False) -> dict[str, Any]:
    """Return the config.json of the companion of a VAE, completed by the defaults of its class.

    source: of the VAE. name: of the companion's folder. Raises ModelUnavailable if there is none, or if its class is
    not known here.
    """
    beside = source.beside(name)
    try:
        config = beside.config(is_local_only=is_local_only)
    except ModelUnavailable as error:
        raise source.failure(f"it decodes only together with the {name} of its pipeline: {error.detail}") from error
    if config is None:
        raise beside.failure("it has weights without a config.json; save the whole pipeline again")
    class_name = config.get("_class_name")
    known = [each for each in COMPANIONS if has_class(each)]
    if class_name not in known:
        raise beside.failure(f"its class {class_name} is not one that this server runs; known: {', '.join(known)}")
    return whole_config(class_name, config)


def _named(found: NamedConfig, origin: str) -> Configuration:
    return Configuration(found.config, origin, found.family)


def _told_by(metadata: Mapping[str, str]) -> Configuration | None:
    """Return the configuration that the author of a file wrote into it; None if there is none of diffusers."""
    try:
        config = json.loads(metadata.get("config", ""))
    except ValueError:
        return None
    is_of_diffusers = isinstance(config, dict) and family_of_class(str(config.get("_class_name"))) is not None
    return Configuration(config, "the metadata of the file") if is_of_diffusers else None


def _decided(stored: Stored) -> Configuration:
    """Return the only configuration that fits the tensors. Raises UnreadableWeights if there are none, or several."""
    fitting = [found for found in named_configs() if _fits(found, stored)]
    said = [name for start, name in ARCHITECTURES.items() if _architecture(stored).startswith(start)]
    said += [name for start, name in MODELS.items() if any(key.startswith(start) for key in stored.others)]
    if OTHER_SCALING in stored.others:
        raise UnreadableWeights(
            f"{stored.file} scales its latents in its own way ({OTHER_SCALING}); set config to the {CONFIG} of its VAE"
        )
    if chosen := [found for found in fitting if found.name in said]:
        return _named(chosen[0], f"what {stored.file} says of itself ({chosen[0].name})")
    alike = {_scaling(found): found for found in reversed(fitting)}
    if len(alike) == 1:
        return _named(fitting[0], f"the only configuration that fits {stored.file} ({fitting[0].name})")
    if alike:
        names = [found.name for found in fitting if found in alike.values()]
        raise UnreadableWeights(
            f"{stored.file} has {form_of(stored.tensors)} and no {CONFIG}, and may be the VAE of {' or '.join(names)}: "
            f"their files look alike and are not used alike; set config, or --vae-config, to {' or '.join(names)}"
        )
    raise UnreadableWeights(_nothing_fits(stored))


def _architecture(stored: Stored) -> str:
    return stored.metadata.get("modelspec.architecture", "").lower()


def _fits(found: NamedConfig, stored: Stored) -> bool:
    """Return whether all tensors that a configuration asks for are there, for at least one direction."""
    from .agreement import directions_in, skeleton  # they need torch, and most models do not need them

    if not is_vae_class(class_name := found.config["_class_name"]):
        return False
    config = whole_config(class_name, found.config)
    try:
        directions_in(skeleton(class_name, found.config, found.name), stored, config, found.name, may_have_more=False)
    except UnreadableWeights:
        return False
    return True


def _scaling(found: NamedConfig) -> object:
    """Return what must be equal in two configurations if it does not matter which of them is used."""
    class_name = found.config["_class_name"]
    family = FAMILIES[found.family] if found.family else family_of_class(class_name)
    assert family is not None
    return family.describe(whole_config(class_name, found.config))


def _nothing_fits(stored: Stored) -> str:
    for _, key, _ in stored.tensors.values():
        if key.startswith(("encoder.", "decoder.", "first_stage_model.", "vae.")):
            return (
                f"{stored.file} has {form_of(stored.tensors)} and no {CONFIG}, and fits none of the well-known "
                f"configurations; put its {CONFIG} beside it, or set config, or --vae-config, to the path of one"
            )
    if other := mistaken_for_a_vae(stored):
        return other
    first = next(iter(stored.tensors.values()))[1]
    return (
        f"{stored.file} has no {CONFIG}, and no tensors of a VAE that this server knows (the first is {first}); "
        f"give the file of a VAE, or set config to its {CONFIG}"
    )


def _all_names() -> str:
    return ", ".join(found.name for found in named_configs())
