"""Any band height, any budget and any number of images together give the same image."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.image.layers import DecoderWeights
from server.engine.coders.image.plan import SMALLEST_BAND_BYTES, Plan, fit, footprint
from server.engine.kernels.moments import GroupNorm
from server.engine.kernels.reference import Kernels
from server.values import Layout
from tests.engine.coders.image.counting import CountingKernels
from tests.engine.coders.image.networks import build, exact, latents_for, stock

WHOLE = 1 << 40
shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9))
images = st.tuples(st.integers(1, 2), st.integers(6, 24), st.integers(4, 16))
band_bytes = st.integers(0, 17).map(lambda power: 1 << power) | st.integers(1, 60_000)


@cache
def decoder(dtype: torch.dtype, plain: bool) -> ExactKLDecoder:
    made = exact(build("sd", dtype))
    return with_plain_kernels(made, dtype) if plain else made


def with_plain_kernels(made: ExactKLDecoder, dtype: torch.dtype) -> ExactKLDecoder:
    made.kernels = Kernels()
    made.network = DecoderWeights.take(build("sd", dtype), made.kernels)
    return made


@settings(deadline=None, max_examples=40)
@given(shape=shapes, band=band_bytes, scores=st.integers(1, 4000), plain=st.booleans(), recomputes=st.booleans())
def test_any_band_height_gives_the_float32_picture(
    shape: tuple[int, int, int], band: int, scores: int, plain: bool, recomputes: bool
) -> None:
    made, latents = decoder(torch.float32, plain), latents_for(build("sd"), *shape)
    with torch.inference_mode():
        banded, _ = made.run(Plan(shape[0], 4, band, scores, 1, recomputes), latents, layout=Layout.SAMPLE)
    torch.testing.assert_close(banded, stock(build("sd"), latents), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    shape=images,
    band=band_bytes,
    unit=st.integers(16_384, 40_000),  # a unit of one or two pixels is no unit
    recomputes=st.booleans(),
)
def test_any_band_height_gives_bfloat16_pixels_within_two_levels(
    shape: tuple[int, int, int], band: int, unit: int, recomputes: bool
) -> None:
    made, latents = decoder(torch.bfloat16, False), latents_for(build("sd", torch.bfloat16), *shape)
    with torch.inference_mode():
        banded, _ = made.run(Plan(1, 2, band, WHOLE, unit, recomputes), latents, layout=Layout.PIXELS)
        whole, _ = made.run(Plan(1, 2, WHOLE, WHOLE, unit), latents, layout=Layout.PIXELS)
    assert (banded.int() - whole.int()).abs().max() <= 2


@given(parts=st.lists(st.integers(1, 7), min_size=1, max_size=6), mean=st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=40)
def test_moments_of_parts_merge_to_those_of_the_whole(parts: list[int], mean: float) -> None:
    generator = torch.Generator().manual_seed(sum(parts))
    x = torch.randn(2, sum(parts), 5, 12, generator=generator) + mean  # [B, H, W, C]
    norm = GroupNorm(3, 1e-6, torch.rand(12, generator=generator) + 0.5, torch.randn(12, generator=generator))
    offset = torch.randn(12, generator=generator)  # [C]
    affine = norm.affine([Kernels().moments(part, 1) for part in x.split(parts, dim=1)], offset)
    whole = (x + offset).permute(0, 3, 1, 2).double()  # [B, C, H, W]
    expected = torch.nn.functional.group_norm(whole, 3, norm.weight.double(), norm.bias.double(), 1e-6)
    got = x.permute(0, 3, 1, 2).double() * affine.scale[:, :, None, None] + affine.shift[:, :, None, None]
    torch.testing.assert_close(got, expected, atol=1e-5 * (1 + abs(mean)), rtol=0)


def test_a_smaller_budget_first_takes_images_apart_and_then_lowers_the_bands() -> None:
    network = exact(build("sd")).network
    need = footprint(network, 64, 64)
    wanted = Plan(4, 4, 4 * need.largest, 1 << 20)
    plans = [fit(need, wanted, budget) for budget in (1 << 40, 3 * need.peak(Plan(1, 4, need.largest, 1 << 20)), 0)]
    assert plans[0] == wanted
    assert plans[1].images == 2
    assert plans[1].band_bytes == wanted.band_bytes
    assert plans[2].images == 1
    assert plans[2].band_bytes == SMALLEST_BAND_BYTES
    assert [plan.recomputes for plan in plans] == [False, False, True]


def test_recomputing_keeps_half_of_what_bands_keep_and_bands_less_than_whole_images() -> None:
    made = exact(build("sd"))
    made.kernels = counting = CountingKernels()
    made.network = DecoderWeights.take(build("sd"), counting)
    latents, most = latents_for(build("sd"), 1, 64, 64), []
    largest = footprint(made.network, 64, 64).largest
    for plan in (
        Plan(1, 4, WHOLE, WHOLE, 1),
        Plan(1, 4, largest >> 4, WHOLE, 1),
        Plan(1, 4, largest >> 4, WHOLE, 1, True),
    ):
        counting.most = 0
        with torch.inference_mode():
            made.run(plan, latents, layout=Layout.PIXELS)
        most.append(counting.most)
    assert most[1] < 0.6 * most[0]
    assert most[2] < 0.7 * most[1]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_the_plan_keeps_its_estimate_within_a_budget_that_can_be_kept(share: float) -> None:
    made = exact(build("sd"))
    need = footprint(made.network, 128, 128)
    generous = fit(need, Plan(1, 4, need.largest, 1 << 20), 1 << 40)
    budget = int(share * need.peak(generous))
    assert need.peak(fit(need, generous, budget)) <= budget
    assert made.peak_bytes(1, 128, 128, budget) <= budget


def test_a_tiny_budget_gives_the_same_picture() -> None:
    vae = build("sd")
    latents = latents_for(vae, 2, 40, 24)
    squeezed = exact(vae).decode(latents, Layout.SAMPLE, budget_bytes=1).tensor
    torch.testing.assert_close(squeezed, stock(vae, latents), atol=1e-4, rtol=0)
