"""Every VAE class that the installed diffusers exports is compared with its pipeline, or refused. A new one is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from server.config import ModelEntry
from server.engine.weights.config_json import read_info
from server.engine.weights.defaults import is_vae_class
from server.engine.weights.hub import Source
from server.errors import ModelUnavailable
from server.families import FAMILIES, family_of_class
from tests.pipelines import SAMPLES
from tests.pipelines.sounds import SOUNDS

# What a plain decode of some of them would get wrong: noise without a seed (the consistency decoder), a mask (the
# asymmetric one), a code book (VQ), sound.
REFUSED = {
    "AsymmetricAutoencoderKL",
    "AutoencoderKLKVAEAudio",
    "AutoencoderRAE",
    "AutoencoderSAME",
    "AutoencoderVidTok",
    "ConsistencyDecoderVAE",
    "Cosmos3AVAEAudioTokenizer",
    "Kandinsky6SRVAE",
    "LongCatAudioDiTVae",
    "MMAudioVAE",
    "RFD4ProteinaAutoencoder",
    "VQModel",
}
EXPORTED = {name for name in dir(diffusers) if is_vae_class(name)}


def source(folder: Path, class_name: str, config: dict[str, Any] | None = None, **entry: Any) -> Source:
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **(config or {})}))
    return Source("odd", ModelEntry(repo=str(folder), **entry), folder)


def refusal(found: Source) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        read_info(found)
    return caught.value.detail


def test_every_class_has_a_family_or_is_listed_as_refused() -> None:
    with_family = {name for name in EXPORTED if family_of_class(name)}
    assert EXPORTED - with_family == REFUSED & EXPORTED, "compare the new class with its pipeline, or refuse it here"
    assert with_family == {name for family in FAMILIES.values() for name in family.class_names} & EXPORTED


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_every_class_with_a_family_is_compared_with_a_pipeline() -> None:
    assert {name for name in EXPORTED if family_of_class(name)} <= {
        *(type(make().vae).__name__ for make in SAMPLES.values()),
        *(type(next(iter(make().parts.values()))).__name__ for make in SOUNDS.values()),
    }


@pytest.mark.parametrize("class_name", sorted(REFUSED & EXPORTED))
def test_an_unknown_class_is_refused_with_what_to_do(class_name: str, tmp_path: Path) -> None:
    said = refusal(source(tmp_path, class_name))
    assert f"does not know the range, scaling and noise of the VAE class {class_name}, so" in said
    assert "known classes: AutoencoderDC, AutoencoderKL, AutoencoderKLAllegro" in said, "each once"
    assert "write `decoder: plain` into its entry of models.yaml" in said


def test_a_plain_decoder_says_what_its_config_lacks(tmp_path: Path) -> None:
    said = refusal(source(tmp_path, "AutoencoderOobleck", decoder="plain"))
    assert "needs the number of latent channels, and its config has none of latent_channels, z_dim, latent_dim" in said
    assert "KeyError" not in said


def test_a_known_class_may_be_decoded_plainly_too(tmp_path: Path) -> None:
    info = read_info(source(tmp_path, "AutoencoderKL", {"latent_channels": 4}, decoder="plain"))
    assert info.latents.family == "plain"


@pytest.mark.parametrize(
    "class_name", ["AudioDiffusionPipeline", "StableDiffusionPipeline", "UNet2DModel", "logging", "x"]
)
def test_what_is_no_vae_is_refused(class_name: str, tmp_path: Path) -> None:
    """The first of them is a stand-in that raises ImportError when it is looked at."""
    assert f"has no VAE class {class_name}" in refusal(source(tmp_path, class_name))
