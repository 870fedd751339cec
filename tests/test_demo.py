"""The embedded model and its sample latents: they are what server/demo/README.md says."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "server" / "demo"


@pytest.fixture(scope="module")
def train() -> dict[str, Any]:
    return runpy.run_path(str(DEMO / "train.py"))


def test_the_weights_are_small_and_load_with_diffusers() -> None:
    assert (DEMO / "diffusion_pytorch_model.safetensors").stat().st_size < 5_000_000
    vae = AutoencoderKL.from_pretrained(DEMO, use_safetensors=True)
    assert (vae.config.latent_channels, len(vae.config.block_out_channels)) == (4, 4)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_a_sample_decodes_to_its_photo(train: dict[str, Any], name: str) -> None:
    """The original is rebuilt from the package that carries it."""
    sample = next(sample for sample in train["SAMPLES"] if sample.photo.name == name)
    assert sample.size == (512, 512)
    decoded = train["decode"](train["load_model"](DEMO), train["load_latents"](DEMO, sample))
    figure = train["psnr"](decoded, train["read_sample"](sample))
    assert figure >= 31
    assert f"{figure:.1f} dB" in (DEMO / "README.md").read_text()


def test_every_sample_says_where_it_comes_from_and_is_scaled_like_a_pipelines() -> None:
    factor = AutoencoderKL.from_pretrained(DEMO, use_safetensors=True).config.scaling_factor
    values = []
    for path in sorted((DEMO / "latents").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            values.append(file.get_tensor("latents").flatten())
        assert {"photo", "package", "licence", "attribution", "box", "size"} <= metadata.keys()
        assert float(metadata["scaling_factor"]) == factor
    assert len(values) == 4
    assert torch.cat(values).float().std() == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_training_runs(tmp_path: Path) -> None:
    command = [sys.executable, DEMO / "train.py", "--out", tmp_path, "--steps", "2", "--batch", "1", "--device", "cpu"]
    told = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    assert "astronaut  512x512" in told
    assert AutoencoderKL.from_pretrained(tmp_path, use_safetensors=True).config.scaling_factor > 0
