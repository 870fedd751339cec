"""That what is said of checkpoints that are not here is true of the classes that would load them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from accelerate import init_empty_weights

from server.config import SHIPPED_MODELS_YAML, load_settings
from server.engine.weights.agreement import OTHER_PARTS
from server.families import family_of_class
from server.families.known import Checkpoint, known
from server.model_info import Direction

ENTRIES = load_settings(config=SHIPPED_MODELS_YAML).models
KNOWN = {name: known(entry.repo, entry.subfolder) for name, entry in ENTRIES.items() if name != "demo"}


@pytest.mark.parametrize("name", KNOWN)
def test_a_listed_checkpoint_is_known_and_builds_as_it_says(name: str) -> None:
    checkpoint = KNOWN[name]
    assert isinstance(checkpoint, Checkpoint), "every shipped entry is in known.yaml"
    with init_empty_weights():
        vae: Any = getattr(diffusers, checkpoint.class_name)(**checkpoint.config)
    counts = {True: 0, False: 0}
    for key, weight in vae.named_parameters():
        counts[key.split(".")[0] in OTHER_PARTS[Direction.DECODE]] += weight.numel()
    assert (counts[False], counts[True]) == (checkpoint.decoder_weights, checkpoint.encoder_weights)
    family = family_of_class(checkpoint.class_name)
    assert family is not None
    spec = family.describe(dict(vae.config))
    said = {**vae.config, **vars(vae)}  # some classes keep the ratios in their config, some as attributes
    spatial = said.get("spatial_compression_ratio") or said.get("scale_factor_spatial")
    assert spatial in (None, spec.vae_scale_factor)
    assert spec.kind == "image" or said.get("temporal_compression_ratio") in (None, spec.temporal_compression_ratio)
