"""That the oracle of encoding is sound: a pipeline's latents are its VAE's most likely ones, scaled by hand."""

from __future__ import annotations

import pytest
import torch

from tests.pipelines import IMAGE_TO_LATENTS, SAMPLES
from tests.pipelines.encoding import certain, vae_input
from tests.pipelines.scale_by_hand import SCALE, latents

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.parametrize("name", IMAGE_TO_LATENTS)
def test_the_pipelines_latents_are_the_most_likely_ones_scaled_by_hand(name: str) -> None:
    sample = SAMPLES[name]()
    vae = certain(sample.vae)
    pixels = vae_input(sample)
    encoded = IMAGE_TO_LATENTS[name](vae, pixels)
    assert encoded.std() > 0.01
    torch.testing.assert_close(encoded, latents(name, vae, pixels), atol=1e-5, rtol=0)


def test_every_encoding_is_scaled_by_hand() -> None:
    assert set(IMAGE_TO_LATENTS) == set(SCALE)
    assert set(IMAGE_TO_LATENTS) < set(SAMPLES)
