"""The exact decoder gives the picture that diffusers gives."""

from __future__ import annotations

import copy

import pytest
import torch

from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.kernels.reference import Kernels
from server.values import Layout
from tests.engine.coders.image.networks import CONFIGS, build, exact, latents_for, psnr, stock

SHAPES = [(1, 8, 8), (2, 7, 5), (1, 1, 13), (1, 11, 1), (3, 1, 1), (4, 3, 9), (1, 33, 4), (1, 2, 40)]


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_equals_diffusers_for_every_kind_of_decoder(config: str) -> None:
    vae = build(config)
    latents = latents_for(vae, 2, 9, 6)
    torch.testing.assert_close(exact(vae).decode(latents, Layout.SAMPLE).tensor, stock(vae, latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_diffusers_for_every_shape(shape: tuple[int, int, int]) -> None:
    vae = build("sd")
    latents = latents_for(vae, *shape)
    torch.testing.assert_close(exact(vae).decode(latents, Layout.SAMPLE).tensor, stock(vae, latents), atol=1e-4, rtol=0)


def test_the_plain_kernels_of_other_devices_equal_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.coders.image.exact_coder.kernels_for", lambda *_: Kernels())
    vae = build("sd")
    latents = latents_for(vae, 2, 7, 5)
    torch.testing.assert_close(exact(vae).decode(latents, Layout.SAMPLE).tensor, stock(vae, latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", ["cpu", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_diffusers(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over several images, because one small image changes the result by half a decibel."""
    if kernels == "plain":
        monkeypatch.setattr("server.engine.coders.image.exact_coder.kernels_for", lambda *_: Kernels())
    vae = build("sd")
    half = build("sd", dtype)
    decoder = exact(copy.deepcopy(half))
    gained = []
    for height in (8, 12, 16, 20):
        latents = latents_for(vae, 2, height, 14)
        reference = stock(vae, latents)
        ours = psnr(decoder.decode(latents, Layout.SAMPLE).tensor, reference)
        gained.append(ours - psnr(stock(half, latents.to(dtype)), reference))
    assert sum(gained) / len(gained) >= -0.3


def test_unit_is_the_sample_denormalized_and_clamped() -> None:
    vae = build("sd")
    latents = 3 * latents_for(vae, 2, 5, 6)
    expected = (stock(vae, latents) / 2 + 0.5).clamp(0, 1)
    assert expected.min() == 0
    assert expected.max() == 1
    torch.testing.assert_close(exact(vae).decode(latents, Layout.UNIT).tensor, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_are_the_unit_layout_rounded_channels_last(dtype: torch.dtype) -> None:
    decoder, latents = exact(build("sd", dtype)), latents_for(build("sd"), 2, 5, 6)
    sample = decoder.decode(latents, Layout.SAMPLE).tensor.float()  # [B, C, H, W]
    pixels = decoder.decode(latents, Layout.PIXELS).tensor  # [B, H, W, C]
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_samples_come_in_the_weights_dtype() -> None:
    decoder = exact(build("sd", torch.bfloat16))
    assert decoder.decode(torch.randn(1, 4, 2, 2), Layout.SAMPLE).tensor.dtype == torch.bfloat16


def test_the_weights_exist_once() -> None:
    vae = build("sd")
    ExactKLDecoder(vae)
    assert sum(parameter.numel() for parameter in vae.decoder.parameters()) == 0
