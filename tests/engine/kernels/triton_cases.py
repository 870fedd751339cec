"""The Triton kernels compute what the plain kernels compute. Run by `test_triton.py` in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from server.engine.coders.build import build_coder
from server.engine.coders.image.layers import DecoderWeights, EncoderWeights
from server.engine.coders.image.plan import Plan
from server.engine.coders.stock import StockDecoder
from server.engine.coders.video import causal_decoder, ltx_decoder
from server.engine.kernels.causal_kernels import CausalKernels
from server.engine.kernels.moments import Affine, GroupNorm, Moments
from server.engine.kernels.reference import Kernels
from server.model_info import Direction
from server.values import Layout
from tests.engine.coders.image.networks import build, exact, exact_encoder, latents_for, pixels_for, stock, stock_encode
from tests.engine.coders.video import test_video_decoders as videos

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


def normalized_error(moments: Moments, x: Tensor) -> float:
    """How far a norm with these moments is from the same norm in float64; of values above 1, as a share of them."""
    channels = x.shape[3]
    norm = GroupNorm(8, 1e-6, torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE))
    affine = norm.affine([moments])
    grouped = x.double().unflatten(3, (8, -1))  # [B, n, W, G, C / G]
    variance, mean = torch.var_mean(grouped, (1, 2, 4), correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-6).sqrt()).flatten(3)
    got = x.double() * affine.scale[:, None, None].double() + affine.shift[:, None, None].double()
    return float(((got - expected) / expected.abs().clamp(min=1)).abs().max())


@pytest.mark.parametrize("mean", [10, 100, 1000, 10_000])
def test_statistics_do_not_suffer_from_a_large_mean(kernels: Kernels, mean: float) -> None:
    """Neither those of an activation nor those of an upsampled one; the bias, which is near zero, says nothing of it."""
    phases, bias = randn(1, 41, 71, 4 * 96) + mean, randn(96)
    image, moments = kernels.interleave(phases, bias, 1)
    limit = 2 * normalized_error(PLAIN.moments(image, 1), image) + 1e-6
    assert normalized_error(moments, image) < limit
    assert normalized_error(kernels.moments(image, 1), image) < limit


def test_statistics_do_not_suffer_from_a_pixel_far_from_the_others(kernels: Kernels) -> None:
    x = randn(1, 40, 70, 96)
    x[:, 0, 0] = 6e4
    assert normalized_error(kernels.moments(x, 1), x) < 2 * normalized_error(PLAIN.moments(x, 1), x) + 1e-6


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 10, 30])
def test_attention_in_half_precision_is_as_exact_as_torch(kernels: Kernels, size: float, dtype: torch.dtype) -> None:
    """With products of queries and keys up to 80,000, which exceed float16 before they are scaled."""
    query, key, value = (randn(1, n, 512)[:, :64] for n in (64, 65, 66))
    query, key, value = (size * query).to(dtype), (size * key).to(dtype), value.to(dtype)
    exact_q, exact_k, exact_v = query.double(), key.double(), value.double()
    expected = torch.softmax(exact_q @ exact_k.transpose(1, 2) / 512**0.5, -1) @ exact_v  # [1, 64, 512]
    theirs = torch.nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    error = (kernels.attend(query, key, value).double() - expected).abs().max()
    assert error < 2 * (theirs.double() - expected).abs().max() + 1e-4


def test_attention_of_large_values_stays_finite_in_half_precision(kernels: Kernels) -> None:
    """The products of queries and keys exceed float16 before they are scaled."""
    query = key = torch.full((1, 4, 512), 12.0, dtype=torch.float16, device=DEVICE)
    value = randn(1, 4, 512).half()
    torch.testing.assert_close(
        kernels.attend(query, key, value), value.mean(1, keepdim=True).expand(-1, 4, -1), atol=2e-3, rtol=1e-2
    )


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_whole_decode_in_bands_equals_diffusers(kernels: Kernels, recomputes: bool) -> None:
    vae = build("one-block").to(DEVICE)
    decoder = exact(vae)
    decoder.kernels, decoder.network = kernels, DecoderWeights.take(build("one-block").to(DEVICE), kernels)
    latents = latents_for(vae, 2, 6, 5)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, _ = decoder.run(Plan(2, 4, 2000, 1 << 20, 1, recomputes), latents, layout=Layout.SAMPLE)
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


@pytest.fixture(scope="module")
def causal(kernels: Kernels) -> CausalKernels:
    from server.engine.kernels.cuda_causal import TritonCausalKernels

    return TritonCausalKernels(kernels)


PLAIN_CAUSAL = CausalKernels(PLAIN)
FRAMES = [(1, 3, 5, 32), (3, 4, 7, 96), (2, 9, 3, 160)]  # [n, r, W, C]


def in_window(x: Tensor) -> tuple[Tensor, Tensor]:
    """A window of sevens with room around the frames, and the part of it that has their size."""
    n, rows, width, channels = x.shape
    window = torch.full((n + 2, rows + 2, width + 2, channels), 7.0, dtype=x.dtype, device=DEVICE)
    return window, window[2:, 1:-1, 1:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_a_pixel_norm_is_written_into_a_window(
    causal: CausalKernels, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = randn(shape[0], shape[1] + 4, *shape[2:]).to(dtype)[:, 2:-2]  # rows of larger frames
    weight = randn(shape[3])
    (got, inside), (expected, inside_expected) = in_window(x), in_window(x)
    causal.norm_silu(x, weight, inside)
    PLAIN_CAUSAL.norm_silu(x, weight, inside_expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 1e-2)
    torch.testing.assert_close(
        causal.norm(x, weight),
        PLAIN_CAUSAL.norm(x, weight),
        atol=1e-5,
        rtol=1e-5 if got.dtype == torch.float32 else 1e-2,
    )


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_a_root_mean_square_norm_is_written_into_a_window(
    causal: CausalKernels, shape: tuple[int, ...], is_scaled: bool
) -> None:
    x = randn(*shape)
    scale, shift = (randn(shape[3]), randn(shape[3]) + 1) if is_scaled else (None, None)
    (got, inside), (expected, inside_expected) = in_window(x), in_window(x)
    causal.rms_norm_silu(x, 1e-3, scale, shift, inside)
    PLAIN_CAUSAL.rms_norm_silu(x, 1e-3, scale, shift, inside_expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_pixel_of_zeros_stays_finite(causal: CausalKernels) -> None:
    x = torch.zeros(1, 1, 2, 32, device=DEVICE)
    assert torch.equal(causal.norm(x, randn(32)), torch.zeros_like(x))


@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_a_group_norm_is_written_into_a_window(causal: CausalKernels, shape: tuple[int, ...]) -> None:
    x, affine = randn(*shape), Affine(randn(1, shape[3]), randn(1, shape[3]) + 1)
    (got, inside), (expected, inside_expected) = in_window(x), in_window(x)
    for frame in range(shape[0]):
        causal.affine_silu(x[frame], affine, inside[frame])
        PLAIN_CAUSAL.affine_silu(x[frame], affine, inside_expected[frame])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_norm_is_scaled_by_its_latents(causal: CausalKernels, ratio: int) -> None:
    rows, width, channels = 5, 3 * ratio, 48
    x, affine = randn(rows, width, channels), Affine(randn(1, channels), randn(1, channels) + 1)
    scale, shift = randn(rows, 3, channels), randn(rows, 3, channels) - 1
    (got, inside), (expected, inside_expected) = in_window(x[None]), in_window(x[None])
    causal.scaled_silu(x, affine, scale, shift, inside[0])
    PLAIN_CAUSAL.scaled_silu(x, affine, scale, shift, inside_expected[0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_frames_are_put_side_by_side(causal: CausalKernels, shape: tuple[int, ...], taps: int) -> None:
    window = randn(shape[0] + taps - 1, *shape[1:])
    got = causal.side_by_side(window, shape[0], taps)
    assert torch.equal(got, PLAIN.side_by_side(window, shape[0], taps))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_phases_interleave_in_time_and_space(causal: CausalKernels, shape: tuple[int, ...], times: int) -> None:
    n, rows, width, channels = shape
    phases = randn(n, rows + 1, width + 1, times * 4 * channels)
    assert torch.equal(causal.interleave(phases, times), PLAIN_CAUSAL.interleave(phases, times))


@pytest.mark.parametrize("in_3d", [False, True])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "easy-animate", "hunyuan-video-1.5", "ltx", "ltx-timestep"])
def test_a_whole_video_equals_diffusers(
    kernels: Kernels, causal: CausalKernels, name: str, in_3d: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both forms of the convolution over frames, which also run on a GPU without Triton."""
    kernels.in_3d = in_3d
    monkeypatch.setattr(causal_decoder, "causal_kernels_for", lambda *_: causal)
    monkeypatch.setattr(ltx_decoder, "causal_kernels_for", lambda *_: causal)
    vae, family = videos.made(name)
    vae = copy.deepcopy(vae).to(DEVICE)
    latents = videos.latents_for(name, 3).to(DEVICE)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = StockDecoder(vae, family).decode(latents, Layout.SAMPLE, **videos.arguments(name)).tensor
        decoder, _ = build_coder(vae, family, Direction.DECODE, "auto", "none")
        got = decoder.decode(latents, Layout.SAMPLE, **videos.arguments(name)).tensor
    kernels.in_3d = False
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
