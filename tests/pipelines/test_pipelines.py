"""That the oracle is sound: a sample's latents, decoded by hand, are its pixels, and a small error in them shows."""

from __future__ import annotations

from dataclasses import replace

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


def test_every_sample_is_decoded_by_hand() -> None:
    assert set(SAMPLES) == set(BY_HAND)
