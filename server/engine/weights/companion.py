"""The second component that some VAEs need to decode, such as the vocoder of LTX-2's audio VAE.

It is in its own folder beside the folder of the VAE, as in every pipeline of diffusers.
"""

from __future__ import annotations

import torch

from .agreement import skeleton
from .headers import UnreadableWeights
from .hub import Source
from .loading import prepared, reading
from .stored import read_stored, some
from .which_config import companion_config


def load_companion(source: Source, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load a companion on the CPU, in evaluation mode. Arguments and errors as for `load_vae`."""
    beside = source.beside(name)
    config = companion_config(source, name)  # refuses a class that this diffusers lacks
    from diffusers.pipelines import ltx2  # only newer versions of diffusers have it

    files = beside.files()
    with reading(beside):
        stored = read_stored(files.weights, files.index)
        module = skeleton(getattr(ltx2, config["_class_name"]), config, "its config.json")
        if missing := [key for key in module.state_dict() if key not in stored.tensors]:
            raise UnreadableWeights(f"{stored.file} lacks {some(missing)}; save the whole pipeline again")
        return prepared(module, stored, beside, dtype)
