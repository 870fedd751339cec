"""The second component that some VAEs need to decode, such as the vocoder of LTX-2's audio VAE.

It is in its own folder beside the folder of the VAE, as in every pipeline of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines import ltx2

from ...errors import ModelUnavailable
from .agreement import read_stored, skeleton, some
from .defaults import with_defaults
from .headers import UnreadableWeights
from .hub import Source
from .loading import prepared, reading

CLASSES = {name: getattr(ltx2, name, None) for name in ("LTX2Vocoder", "LTX2VocoderWithBWE")}
"""The classes that a companion may have. Older versions of diffusers lack some."""


def companion_config(source: Source, name: str, *, is_local_only: bool = False) -> dict[str, Any]:
    """Return the config.json of a companion, completed by the defaults of its class.

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
    return with_defaults(_class(beside, config), config)


def load_companion(source: Source, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load a companion on the CPU, in evaluation mode. Arguments and errors as for `load_vae`."""
    beside = source.beside(name)
    config = companion_config(source, name)
    files = beside.files()
    with reading(beside):
        stored = read_stored(files.weights, files.index)
        module = skeleton(_class(beside, config), config, "its config.json")
        if missing := [key for key in module.state_dict() if key not in stored.tensors]:
            raise UnreadableWeights(f"{stored.file} lacks {some(missing)}; save the whole pipeline again")
        return prepared(module, stored, beside, dtype)


def _class(source: Source, config: Mapping[str, Any]) -> Any:
    found = CLASSES.get(str(config.get("_class_name")))
    if found is None:
        known = ", ".join(name for name, made in CLASSES.items() if made)
        raise source.failure(f"its class {config.get('_class_name')} is not one that this server runs; known: {known}")
    return found
