"""The Triton kernels compute what the plain kernels compute. Run by `test_triton.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.engine.coders.image.layers import DecoderWeights, EncoderWeights
from server.engine.coders.image.plan import Plan
from server.engine.kernels.moments import Affine, GroupNorm, Moments
from server.engine.kernels.reference import Kernels
from server.values import Layout
from tests.engine.coders.image.networks import build, exact, exact_encoder, latents_for, pixels_for, stock, stock_encode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 3, 5, 32), (2, 17, 9, 160), (1, 40, 70, 96)]  # [B, n, W, C]
PLAIN = Kernels()


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    from server.engine.kernels.cuda import TritonKernels

    return TritonKernels()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def norm_of(channels: int) -> GroupNorm:
    return GroupNorm(8, 1e-6, randn(channels).abs() + 0.5, randn(channels))


def assert_same_norm(got: Moments, expected: Moments) -> None:
    norm = norm_of(got.mean.shape[2])
    assert_same_affine(norm.affine([got]), norm.affine([expected]))


def assert_same_affine(got: Affine, expected: Affine) -> None:
    torch.testing.assert_close(got.scale, expected.scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.shift, expected.shift, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_survive_a_large_mean(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x = randn(*shape) + 100
    assert_same_norm(kernels.moments(x, 1), PLAIN.moments(x, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_residual_is_added_in_place_with_its_moments(kernels: Kernels, shape: tuple[int, ...]) -> None:
    total, x, bias = randn(*shape), randn(*shape) + 3, randn(shape[3])
    expected = total.clone()
    weight = torch.zeros(shape[3], shape[3], 3, 3, device=DEVICE)
    weight[torch.arange(shape[3]), torch.arange(shape[3]), 1, 1] = 1.0  # the identity
    with_halo = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1))  # [B, n + 2, W, C]
    expected_moments = PLAIN.add_conv_(expected, with_halo, weight, bias, 1)
    assert_same_norm(kernels.add_conv_(total, with_halo, weight, bias, 1), expected_moments)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_phases_interleave_to_the_upsampled_image(kernels: Kernels, shape: tuple[int, ...]) -> None:
    batch, n, width, channels = shape
    phases, bias = randn(batch, n + 1, width + 1, 4 * channels), randn(channels)
    image, moments = kernels.interleave(phases, bias, 1)
    expected, expected_moments = PLAIN.interleave(phases, bias, 1)
    torch.testing.assert_close(image, expected)
    assert_same_norm(moments, expected_moments)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_norm_is_applied_between_halo_rows_and_leaves_them_alone(
    kernels: Kernels, shape: tuple[int, ...], silu: bool
) -> None:
    batch, n, width, channels = shape
    x, affine = randn(*shape), Affine(randn(batch, channels), randn(batch, channels))
    got, expected = (torch.full((batch, n + 2, width, channels), 7.0, device=DEVICE) for _ in range(2))
    kernels.normalize(x, affine, got[:, 1:-1], silu=silu)
    PLAIN.normalize(x, affine, expected[:, 1:-1], silu=silu)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_statistics_merge_in_one_kernel(kernels: Kernels, parts: int, offset: bool) -> None:
    channels, norm = 96, norm_of(96)
    moments = [
        Moments(randn(150).abs() + 1, randn(150, 2, channels) + part, randn(150, 2, channels).abs())
        for part in range(parts)
    ]
    bias = randn(channels) if offset else None
    assert_same_affine(kernels.affine(norm, moments, bias), norm.affine(moments, bias))


@pytest.mark.parametrize("positions", [7, 50, 5000])
def test_attention_equals_torch(kernels: Kernels, positions: int) -> None:
    query, key, value = randn(2, 6, 32), 3 * randn(2, positions, 32), randn(2, positions, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(kernels.attend(query, key, value), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_whole_decode_in_bands_equals_diffusers(kernels: Kernels, recomputes: bool) -> None:
    vae = build("one-block").to(DEVICE)
    decoder = exact(vae)
    decoder.kernels, decoder.network = kernels, DecoderWeights.take(build("one-block").to(DEVICE), kernels)
    latents = latents_for(vae, 2, 6, 5)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, _ = decoder.run(Plan(2, 4, 2000, 1 << 20, 1, recomputes), latents, Layout.SAMPLE)
        torch.testing.assert_close(got, stock(vae, latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_whole_encode_in_bands_equals_diffusers(kernels: Kernels, recomputes: bool) -> None:
    vae = build("no-quant").to(DEVICE)
    encoder = exact_encoder(vae)
    encoder.kernels, encoder.network = kernels, EncoderWeights.take(build("no-quant").to(DEVICE), kernels)
    pixels = pixels_for(vae, 2, 3, 5)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, _ = encoder.run(Plan(2, 4, 2000, 1 << 20, 1, recomputes), pixels)
        torch.testing.assert_close(got, stock_encode(vae, pixels), atol=1e-4, rtol=0)
