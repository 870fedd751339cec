"""The exact encoder gives the posterior that diffusers gives, in any bands, and declines what it does not know."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from server.engine.coders.build import build_coder
from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.image.encoder import ExactKLEncoder
from server.engine.coders.image.layers import EncoderWeights
from server.engine.coders.image.plan import SMALLEST_BAND_BYTES, Plan, footprint
from server.engine.kernels.reference import Kernels
from server.families import FAMILIES
from server.model_info import Direction
from server.values import Layout
from tests.engine.coders.image.counting import CountingKernels
from tests.engine.coders.image.networks import (
    CONFIGS,
    build,
    exact_encoder,
    latents_for,
    pixels_for,
    psnr,
    stock,
    stock_encode,
)
from tests.engine.coders.image.test_structure import set_of

KL = FAMILIES["kl"]
WHOLE = 1 << 40
SHAPES = [(1, 8, 8), (2, 7, 5), (1, 1, 13), (1, 11, 1), (3, 1, 1), (4, 3, 9), (1, 33, 4), (1, 2, 40)]


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_equals_diffusers_for_every_kind_of_encoder(config: str) -> None:
    vae = build(config)
    pixels = pixels_for(vae, 2, 9, 6)
    got = exact_encoder(vae).encode(pixels).tensor
    torch.testing.assert_close(got, stock_encode(vae, pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_diffusers_for_every_shape(shape: tuple[int, int, int]) -> None:
    vae = build("sd")
    pixels = pixels_for(vae, *shape)
    torch.testing.assert_close(exact_encoder(vae).encode(pixels).tensor, stock_encode(vae, pixels), atol=1e-4, rtol=0)


@cache
def encoder(plain: bool) -> ExactKLEncoder:
    made = exact_encoder(build("sd"))
    return with_kernels(made, Kernels()) if plain else made


def with_kernels(made: ExactKLEncoder, kernels: Kernels) -> ExactKLEncoder:
    made.kernels, made.network = kernels, EncoderWeights.take(build("sd"), kernels)
    return made


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9)),
    images=st.integers(1, 3),
    band=st.integers(0, 17).map(lambda power: 1 << power) | st.integers(1, 60_000),
    scores=st.integers(1, 4000),
    unit=st.integers(1, 40_000),
    plain=st.booleans(),
    recomputes=st.booleans(),
)
def test_any_bands_of_any_number_of_images_give_the_float32_posterior(
    shape: tuple[int, int, int], images: int, band: int, scores: int, unit: int, plain: bool, recomputes: bool
) -> None:
    pixels = pixels_for(build("sd"), *shape)
    with torch.inference_mode():
        banded, _ = encoder(plain).run(Plan(images, 4, band, scores, unit, recomputes), pixels)
    torch.testing.assert_close(banded, stock_encode(build("sd"), pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", ["cpu", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_diffusers(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "plain":
        monkeypatch.setattr("server.engine.coders.image.exact_coder.kernels_for", lambda *_: Kernels())
    vae, half = build("sd"), build("sd", dtype)
    pixels = pixels_for(vae, 2, 20, 14)
    reference = stock_encode(vae, pixels)
    ours = psnr(exact_encoder(half).encode(pixels).tensor, reference)
    assert ours >= psnr(stock_encode(half, pixels.to(dtype)), reference) - 0.3


def test_a_tiny_budget_gives_the_same_posterior_in_the_lowest_bands() -> None:
    vae = build("sd")
    pixels = pixels_for(vae, 2, 40, 24)
    squeezed = exact_encoder(vae)
    plan = squeezed.plan(2, *pixels.shape[2:], budget_bytes=1)
    assert (plan.images, plan.band_bytes, plan.recomputes) == (1, SMALLEST_BAND_BYTES, True)
    torch.testing.assert_close(
        squeezed.encode(pixels, budget_bytes=1).tensor, stock_encode(vae, pixels), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("share", [0.9, 0.7, 0.6])
def test_the_plan_keeps_its_estimate_within_a_budget_that_can_be_kept(share: float) -> None:
    made = exact_encoder(build("sd"))
    budget = int(share * made.peak_bytes(1, 1024, 1024, WHOLE))
    assert made.peak_bytes(1, 1024, 1024, budget) <= budget


def test_bands_keep_less_than_whole_images_and_recomputing_less_than_bands() -> None:
    made = with_kernels(exact_encoder(build("sd")), counting := CountingKernels())
    pixels, most = pixels_for(build("sd"), 1, 64, 64), []
    largest = footprint(made.network, *pixels.shape[2:]).largest
    for band, recomputes in ((WHOLE, False), (largest >> 4, False), (largest >> 4, True)):
        counting.most = 0
        with torch.inference_mode():
            made.run(Plan(1, 4, band, WHOLE, 1, recomputes), pixels)
        most.append(counting.most)
    assert most[1] < 0.75 * most[0]
    assert most[2] < 0.7 * most[1]


def test_pixels_of_any_dtype_come_back_in_the_weights_dtype() -> None:
    made = exact_encoder(build("sd", torch.bfloat16))
    pixels = pixels_for(build("sd"), 1, 2, 3)
    single, double = made.encode(pixels).tensor, made.encode(pixels.double()).tensor
    assert single.dtype == torch.bfloat16
    assert torch.equal(single, double)


def test_finite_says_whether_the_last_posterior_was() -> None:
    made, pixels = exact_encoder(build("sd")), pixels_for(build("sd"), 1, 4, 4)
    assert not made.encode(torch.full_like(pixels, torch.nan)).finite
    assert made.encode(pixels).finite


@pytest.mark.parametrize("decoder_first", [True, False])
def test_encoder_and_decoder_come_from_one_vae_in_any_order(decoder_first: bool) -> None:
    vae, taken = build("sd"), build("sd")
    if decoder_first:
        decoder, made = ExactKLDecoder(taken), ExactKLEncoder(taken)
    else:
        made, decoder = ExactKLEncoder(taken), ExactKLDecoder(taken)
    assert all(parameter.numel() == 0 for parameter in taken.parameters())
    pixels, latents = pixels_for(vae, 1, 4, 4), latents_for(vae, 1, 4, 4)
    torch.testing.assert_close(made.encode(pixels).tensor, stock_encode(vae, pixels), atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.decode(latents, Layout.SAMPLE).tensor, stock(vae, latents), atol=1e-4, rtol=0)


def test_the_decoders_weights_are_freed_with_the_vae() -> None:
    vae = build("sd")
    made = ExactKLEncoder(vae)
    weight = weakref.ref(vae.decoder.conv_in.weight)
    del vae
    gc.collect()
    assert weight() is None
    assert made.network.conv_in.out_channels == 32


@pytest.mark.parametrize("config", CONFIGS)
def test_every_plain_encoder_is_supported(config: str) -> None:
    made, reason = build_coder(build(config), KL, Direction.ENCODE, "auto", "none")
    assert isinstance(made, ExactKLEncoder)
    assert reason is None


CHANGES: dict[str, Callable[[Any], None]] = {
    "reflected padding": set_of("encoder.conv_in.padding_mode", "reflect"),
    "grouped channels": set_of("encoder.conv_out.groups", 2),
    "a 5x5 convolution": set_of("encoder.conv_out", nn.Conv2d(64, 8, 5, padding=2)),
    "a strided quant_conv": set_of("quant_conv.stride", (2, 2)),
    "another activation": set_of("encoder.mid_block.resnets.0.nonlinearity", nn.GELU()),
    "another output activation": set_of("encoder.conv_act", nn.ReLU()),
    "another norm": set_of("encoder.conv_norm_out", nn.BatchNorm2d(64)),
    "a scaled output": set_of("encoder.down_blocks.1.resnets.0.output_scale_factor", 2.0),
    "two heads": set_of("encoder.mid_block.attentions.0.heads", 2),
    "another encoder": set_of("encoder", nn.Identity()),
    "a symmetric downsample": set_of("encoder.down_blocks.0.downsamplers.0.padding", 1),
    "a downsample that does not halve": set_of("encoder.down_blocks.0.downsamplers.0.conv.stride", (1, 1)),
    "a downsample without convolution": set_of("encoder.down_blocks.0.downsamplers.0.use_conv", False),
    "a normed downsample": set_of("encoder.down_blocks.0.downsamplers.0.norm", nn.LayerNorm(32)),
    "another downsample": lambda vae: vae.encoder.down_blocks[0].downsamplers.__setitem__(0, nn.AvgPool2d(2)),
    "two downsamples": lambda vae: vae.encoder.down_blocks[0].downsamplers.extend(
        vae.encoder.down_blocks[1].downsamplers
    ),
    "an unknown part": lambda vae: vae.encoder.add_module("refiner", nn.Identity()),
    "an unknown block": lambda vae: vae.encoder.down_blocks.append(nn.Identity()),
    "two dtypes": lambda vae: vae.quant_conv.to(torch.float16),
    "float64": lambda vae: vae.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_unknown_part_gives_a_reason_and_no_encoder(change: str) -> None:
    vae = build("sd")
    CHANGES[change](vae)
    made, reason = build_coder(vae, KL, Direction.ENCODE, "auto", "none")
    assert made.name == "diffusers"
    assert reason is not None
    assert reason.endswith(".")
    assert ExactKLDecoder.unsupported_reason(vae) is None or change == "float64"


def test_another_class_is_not_supported() -> None:
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    made, reason = build_coder(tiny, FAMILIES["tiny"], Direction.ENCODE, "auto", "none")
    assert (made.name, reason) == ("diffusers", "AutoencoderTiny is not one of AutoencoderKL, AutoencoderKLFlux2.")


@pytest.mark.parametrize(
    ("choice", "tiling", "word"), [("diffusers", "none", "encoder"), ("auto", "diffusers", "tile")]
)
def test_models_yaml_may_ask_for_diffusers_own(choice: str, tiling: str, word: str) -> None:
    made, reason = build_coder(build("sd"), KL, Direction.ENCODE, choice, tiling)
    assert made.name == "diffusers"
    assert word in str(reason)
