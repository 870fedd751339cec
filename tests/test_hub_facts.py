"""What known.yaml says of checkpoints, compared with the Hub's own files and model cards. Downloads no weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from server.engine.weights.defaults import whole_config
from server.families.known import Checkpoint, all_known

# Entries of a config.json that do not change what a VAE computes. Statistics may be in the file only.
IGNORED = {"_class_name", "_diffusers_version", "_name_or_path", "sample_size", "force_upcast"}
STATISTICS = {"latents_mean", "latents_std"}
UNREACHABLE = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError)


@dataclass(frozen=True)
class Published:
    """What the Hub says. licence: the words of the card's metadata. weights: the SHA-256 of each safetensors file."""

    config: dict[str, Any]
    licence: str
    is_gated: bool
    weights: frozenset[str]


def published(name: str) -> Published:
    """name: a key of known.yaml. Skips the test where the repository cannot be read, or has no config.json."""
    if "VAE_TEST_HUB" not in os.environ:
        pytest.skip("needs the network; `make test-hub` runs it")
    repo, _, subfolder = name.partition(":")
    if subfolder.endswith(".safetensors"):
        pytest.skip(f"{name}: a file by itself, whose headers `check` compares with the configuration")
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        path = hf_hub_download(repo, "config.json", subfolder=subfolder or None)
    except UNREACHABLE as error:
        pytest.skip(f"{name}: {type(error).__name__}")
    folder = f"{subfolder}/" if subfolder else ""
    files = [file for file in info.siblings or [] if file.rfilename.startswith(folder)]
    weights = {file.lfs.sha256 for file in files if file.lfs and file.rfilename.endswith(".safetensors")}
    card = info.card_data or {}
    licence = f"{card.get('license')} {card.get('license_name')}"
    return Published(json.loads(Path(path).read_text()), licence, bool(info.gated), frozenset(weights))


def comparable(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries that the class reads, with its defaults, in JSON's types."""
    whole = whole_config(class_name, config)
    read = whole_config(class_name, {}).keys() - IGNORED
    return {key: value for key, value in json.loads(json.dumps(whole)).items() if key in read}


def differences(checkpoint: Checkpoint, found: Published) -> list[str]:
    """What known.yaml says otherwise than the Hub."""
    if found.config["_class_name"] != checkpoint.class_name:
        return [f"class {found.config['_class_name']}"]
    ours, theirs = (comparable(checkpoint.class_name, each) for each in (checkpoint.config, found.config))
    said = checkpoint.config.keys()
    wrong = [
        f"{key} {theirs[key]}"
        for key in theirs
        if ours.get(key) != theirs[key] and (key not in STATISTICS or key in said)
    ]
    if found.is_gated != checkpoint.gated:
        wrong.append(f"gated {found.is_gated}")
    words = checkpoint.licence.lower().replace("-", " ").split()
    if checkpoint.licence != "see the repository" and words[0] not in found.licence.lower():
        wrong.append(f"licence {found.licence}")
    return wrong


@pytest.mark.hub
@pytest.mark.parametrize("name", all_known())
def test_known_facts_are_those_of_the_hub(name: str) -> None:
    assert differences(all_known()[name], published(name)) == []


@pytest.mark.hub
@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, known in all_known().items() for other in known.shared_by]
)
def test_an_alias_means_the_same_vae(name: str, other: str) -> None:
    """The same configuration and, unless one of them was saved in another dtype or in other files, the same weights."""
    ours, theirs = published(name), published(other)
    class_name = all_known()[name].class_name
    assert theirs.config["_class_name"] == class_name
    assert comparable(class_name, theirs.config) == comparable(class_name, ours.config)
    if not ours.weights & theirs.weights:
        pytest.skip(f"{other}: other files than those of {name}; compare the tensors by hand")


KNOWN = Checkpoint("AutoencoderKL", "Apache-2.0", 1, 1, config={"latent_channels": 16, "scaling_factor": 0.5})
CONFIG = {"_class_name": "AutoencoderKL", "_diffusers_version": "1", "latent_channels": 16, "scaling_factor": 0.5}
FOUND = Published(CONFIG, "apache-2.0 None", is_gated=False, weights=frozenset())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (FOUND, []),
        (replace(FOUND, config=CONFIG | {"latents_mean": [0.0] * 16, "sample_size": 1024, "other": 1}), []),
        (replace(FOUND, config=CONFIG | {"scaling_factor": 0.25}), ["scaling_factor 0.25"]),
        (replace(FOUND, config=CONFIG | {"layers_per_block": 3}), ["layers_per_block 3"]),
        (replace(FOUND, config=CONFIG | {"_class_name": "AutoencoderTiny"}), ["class AutoencoderTiny"]),
        (replace(FOUND, is_gated=True), ["gated True"]),
        (replace(FOUND, licence="mit None"), ["licence mit None"]),
    ],
)
def test_a_difference_is_found(found: Published, expected: list[str]) -> None:
    assert differences(KNOWN, found) == expected
