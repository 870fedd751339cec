"""That the oracle is sound: a sample's latents, decoded by hand, are its pixels, and a small error in them shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.pipelines import SAMPLES
from tests.pipelines.by_hand import BY_HAND, pixels

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.parametrize("name", SAMPLES)
def test_latents_decoded_by_hand_are_the_pipelines_pixels(name: str) -> None:
    sample = SAMPLES[name]()
    torch.testing.assert_close(pixels(sample), sample.pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_tenth_of_a_deviation_shows_in_the_pixels(name: str) -> None:
    sample = SAMPLES[name]()
    off = replace(sample, latents=sample.latents + 0.1 * sample.latents.std())
    assert (pixels(off) - sample.pixels).abs().mean() > 1e-3


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_says_what_it_holds(name: str) -> None:
    sample = SAMPLES[name]()
    assert sample.name == name
    assert sample.latents.isfinite().all()
    assert sample.pixels.dtype == torch.float32
    assert sample.pixels.shape[-2:] == (sample.height, sample.width)
    assert sample.is_packed == (sample.latents.ndim == 3)
    assert 0 <= sample.pixels.min() < sample.pixels.max() <= 1


@pytest.mark.parametrize("name", SAMPLES)
def test_a_saved_vae_makes_the_same_pixels(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]()
    sample.vae.save_pretrained(tmp_path)
    loaded = type(sample.vae).from_pretrained(tmp_path).eval()
    if name == "allegro":
        loaded.enable_tiling()
    torch.testing.assert_close(pixels(replace(sample, vae=loaded)), sample.pixels, atol=1e-5, rtol=0)


def test_every_sample_is_decoded_by_hand() -> None:
    assert set(SAMPLES) == set(BY_HAND)
