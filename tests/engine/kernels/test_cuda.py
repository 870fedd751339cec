"""What only a GPU can show: recorded graphs replay the decode they recorded, for as many shapes as are asked for."""

from __future__ import annotations

import pytest
import torch

from server.engine.graphs import GRAPHS
from server.values import Layout
from tests.engine.coders.image.networks import (
    build,
    exact,
    exact_encoder,
    latents_for,
    pixels_for,
    psnr,
    stock,
    stock_encode,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_more_shapes_than_graphs_are_kept_all_decode_right_twice() -> None:
    vae = build("sd").cuda()
    decoder = exact(vae)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(2):
            for height in range(3, 3 + GRAPHS + 3):
                latents = latents_for(vae, 1 + height % 3, height, 7)
                got = decoder.decode(latents, Layout.SAMPLE).tensor
                torch.testing.assert_close(got, stock(vae, latents), atol=1e-4, rtol=0)
    assert decoder.graphs is not None
    assert len(decoder.graphs) == GRAPHS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_diffusers(dtype: torch.dtype) -> None:
    vae, half = build("sd").cuda(), build("sd", dtype).cuda()
    latents = latents_for(vae, 2, 20, 14)
    reference = stock(vae, latents)
    ours = psnr(exact(half).decode(latents, Layout.SAMPLE).tensor, reference)
    assert ours >= psnr(stock(half, latents.to(dtype)), reference) - 0.3


def test_every_layout_is_its_own_recording() -> None:
    vae = build("sd").cuda()
    decoder, latents = exact(vae), latents_for(vae, 2, 5, 6)
    sample = decoder.decode(latents, Layout.SAMPLE).tensor  # [B, C, H, W]
    pixels = decoder.decode(latents, Layout.PIXELS).tensor  # [B, H, W, C]
    expected = ((sample.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (pixels.int() - expected.int()).abs().max() <= 1


def test_a_replayed_encode_equals_diffusers() -> None:
    vae = build("sd").cuda()
    encoder = exact_encoder(vae)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for height in (3, 5, 3, 5, 3):
            pixels = pixels_for(vae, 2, height, 7)
            torch.testing.assert_close(encoder.encode(pixels).tensor, stock_encode(vae, pixels), atol=1e-4, rtol=0)
    assert encoder.graphs is not None
    assert len(encoder.graphs) == 2
