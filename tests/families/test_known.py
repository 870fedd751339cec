"""That what is said of checkpoints that are not here is true of the classes that would load them."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import init_empty_weights

from server.config import SHIPPED_MODELS_YAML, load_settings
from server.engine.weights.agreement import vae_class
from server.engine.weights.stored import OTHER_PARTS
from server.families import FAMILIES, family_of_class
from server.families.known import Checkpoint, all_known, known
from server.model_info import Direction

ENTRIES = load_settings(config=SHIPPED_MODELS_YAML).models
KNOWN = {name: known(entry.repo, entry.subfolder, entry.file) for name, entry in ENTRIES.items() if name != "demo"}


@pytest.mark.parametrize("name", KNOWN)
def test_a_listed_checkpoint_is_known_and_builds_as_it_says(name: str) -> None:
    checkpoint = KNOWN[name]
    assert isinstance(checkpoint, Checkpoint), "every shipped entry is in known.yaml"
    with init_empty_weights():
        vae: Any = vae_class(checkpoint.class_name)(**checkpoint.config)
    counts = {True: 0, False: 0}
    for key, weight in vae.named_parameters():
        counts[key.split(".")[0] in OTHER_PARTS[Direction.DECODE]] += weight.numel()
    assert (counts[False], counts[True]) == (checkpoint.decoder_weights, checkpoint.encoder_weights)
    named = ENTRIES[name].family
    family = FAMILIES[named] if named else family_of_class(checkpoint.class_name)
    assert family is not None
    assert checkpoint.class_name in family.class_names
    spec = family.describe(dict(vae.config) | ({family.companion: checkpoint.companion} if family.companion else {}))
    said = {**vae.config, **vars(vae)}  # some classes keep the ratios in their config, some as attributes
    spatial = said.get("spatial_compression_ratio") or said.get("scale_factor_spatial")
    assert spatial in (None, spec.vae_scale_factor)
    assert spec.kind != "video" or said.get("temporal_compression_ratio") in (None, spec.temporal_compression_ratio)


def test_what_is_unverified_has_a_source() -> None:
    for name, checkpoint in all_known().items():
        assert set(checkpoint.unverified) <= {"licence", "gated", "config"}, name
        assert checkpoint.source or not checkpoint.unverified, f"{name}: say where its facts come from"


def test_every_known_checkpoint_has_an_entry() -> None:
    found = [known(entry.repo, entry.subfolder, entry.file) for entry in ENTRIES.values()]
    assert [name for name, checkpoint in all_known().items() if checkpoint not in found] == []
