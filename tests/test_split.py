"""One image on several workers, the prototype of docs/several-devices.md: the same bits as on one worker."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.split import count, decode_whole, plan_for, split
from server.engine.coders.image.decoder import ExactKLDecoder
from tests.engine.coders.image.networks import build, latents_for

pytestmark = pytest.mark.usefixtures("one_core")  # the bits also depend on the number of threads


# One row, or some rows of the small layers. A share must consist of whole units.
@pytest.mark.parametrize("unit_bytes", [1, 4096])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_workers_decode_the_same_bits_as_one(workers: int, dtype: torch.dtype, unit_bytes: int) -> None:
    vae = build("sd").to(dtype)
    latents = latents_for(vae, 1, 4 * workers, 9).to(dtype)
    found, sent, _ = split(copy.deepcopy(vae), latents, workers, unit_bytes)
    with torch.inference_mode():
        coder = ExactKLDecoder(copy.deepcopy(vae))
        expected = decode_whole(coder.network, coder.kernels, plan_for(coder.network, unit_bytes), latents)
    assert torch.equal(found, expected)
    assert found.float().std() > 0.01
    assert sent == count(coder.network, 4 * workers, 9, workers, unit_bytes)
