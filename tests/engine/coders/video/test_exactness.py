"""Every video family against diffusers' plain decode: many shapes, every budget, half precision, published widths."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from server.engine.coders.build import build_coder
from server.engine.coders.stock import StockDecoder
from server.errors import WrongShape
from server.families import family_of_class
from server.model_info import Direction
from server.values import Layout
from tests.engine.coders.image.networks import psnr
from tests.engine.coders.video.test_video_decoders import (
    IMAGES,
    VIDEOS,
    arguments,
    assert_same,
    latents_for,
    made,
    ours,
)
from tests.engine.coders.video.test_video_decoders import stock as stock_decode

pytestmark = pytest.mark.usefixtures("one_core")

SHAPES = [(1, 3, 5), (3, 2, 3), (7, 3, 2), (21, 2, 2), (3, 1, 6), (2, 9, 1), (2, 2, 11)]  # latent (F, h, w)
WAN_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "is_residual": True,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.1": ("AutoencoderKLWan", {}),
    "Wan 2.2 5B": ("AutoencoderKLWan", WAN_22),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}),
    "HunyuanVideo 1.5": ("AutoencoderKLHunyuanVideo15", {}),
    "CogVideoX": ("AutoencoderKLCogVideoX", {}),
    "Mochi": ("AutoencoderKLMochi", {}),
    "EasyAnimate": ("AutoencoderKLMagvit", {}),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_of_any_shape_equals_a_plain_decode(name: str, shape: tuple[int, int, int]) -> None:
    latents = latents_for(name, *shape, batch=2 if shape[0] == 3 else 1)
    if name == "ltx2" and min(shape[1:]) == 1:  # it mirrors frames at their edges; diffusers cannot do it either
        with pytest.raises(WrongShape, match="latents of at least 2x2"):
            ours(name).decode(latents, Layout.SAMPLE)
        return
    found = ours(name).decode(latents, Layout.SAMPLE, **arguments(name)).tensor
    assert_same(found, stock_decode(name, latents))


@pytest.mark.parametrize("shape", [(1, 6), (9, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_shape_equals_a_plain_decode(name: str, shape: tuple[int, int]) -> None:
    latents = latents_for(name, 1, *shape, batch=2)
    assert_same(ours(name).decode(latents, Layout.SAMPLE).tensor, stock_decode(name, latents))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", VIDEOS)
def test_every_budget_gives_the_same_video(name: str, share: float) -> None:
    """Within one level. The budgets are between the memory of the smallest plan and of the fastest one."""
    latents = latents_for(name, 5, 12, 4)
    decoder = ours(name)
    pixels = decoder.decode(latents, Layout.PIXELS, **arguments(name)).tensor
    smallest, fastest = (decoder.plan(5, 12, 4, budget).peak_bytes for budget in (1, 1 << 40))
    budget = int(smallest + share * (fastest - smallest))
    found = decoder.decode(latents, Layout.PIXELS, budget_bytes=budget, **arguments(name)).tensor
    torch.testing.assert_close(found.int(), pixels.int(), atol=1, rtol=0)


@cache
def halves(name: str) -> tuple[Any, Any]:
    """Our decoder and diffusers' own, in bfloat16."""
    vae, family = made(name)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    return build_coder(copy.deepcopy(half), family, Direction.DECODE, "auto", "none")[0], StockDecoder(half, family)


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_bfloat16_is_as_close_to_float32_as_diffusers_own(name: str) -> None:
    """The mean over several videos, because one small video changes the result by half a decibel."""
    ours_half, theirs_half = halves(name)
    gained = []
    for frames in (2, 3, 4, 5, 6):
        latents = latents_for(name, frames, 6, 6).bfloat16().float()
        expected = stock_decode(name, latents)
        with torch.inference_mode():
            found, theirs = (
                decoder.decode(latents, Layout.SAMPLE, **arguments(name)).tensor for decoder in (ours_half, theirs_half)
            )
        gained.append(psnr(found.float(), expected) - psnr(theirs.float(), expected))
    assert sum(gained) / len(gained) >= -0.3


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_width_equals_a_plain_decode(name: str) -> None:
    """A few latent pixels, with as many channels as the published checkpoint."""
    class_name, config = PUBLISHED[name]
    family = family_of_class(class_name)
    assert family is not None
    torch.manual_seed(0)
    vae = getattr(diffusers, class_name)(**config).eval()
    vae.encoder = torch.nn.Identity()
    if class_name == "AutoencoderKLHunyuanVideo":
        vae.use_framewise_decoding = False
    channels = family.describe(vae.config).channels
    shape = (channels, 2, 2) if class_name == "AutoencoderKLQwenImage" else (channels, 2, 1, 2)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = StockDecoder(vae, family).decode(latents, Layout.SAMPLE).tensor
        decoder, reason = build_coder(vae, family, Direction.DECODE, "auto", "none")
        assert (decoder.name, reason) == ("exact", None)
        found = decoder.decode(latents, Layout.SAMPLE).tensor
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
