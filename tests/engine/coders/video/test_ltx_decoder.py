"""The exact decoder of LTX-Video and LTX-2 against diffusers' plain decode, for the structure of each release."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from torch import Tensor, nn

from server.engine.coders.build import build_coder
from server.engine.coders.layouts import postprocess
from server.engine.coders.stock import StockDecoder
from server.engine.coders.video import ltx_decoder
from server.engine.kernels import trial
from server.errors import WrongShape
from server.families import family_of_class
from server.model_info import Direction
from server.values import Layout
from tests.engine.live import peak_beside_output
from tests.pipelines import vaes
from tests.pipelines.sample import seeded

pytestmark = pytest.mark.usefixtures("one_core")

SMALLEST = 1  # as a budget: the lowest slabs
TIMESTEP = {"timestep": 0.05}
RESIDUAL: dict[str, Any] = {
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
"""What the decoders of LTX-Video since 0.9.1 have in common."""


def ltx_09(**config: Any) -> Any:
    """LTX-Video 0.9.0: channels that change inside the blocks, no residuals around the upsamplers."""
    return vaes.ltx(**{"decoder_block_out_channels": (8, 16, 32, 32)} | config)


def ltx_095(**config: Any) -> Any:
    """LTX-Video 0.9.5 and 0.9.7: a timestep, and residuals around the upsamplers."""
    blocks = {"decoder_block_out_channels": (16, 32, 64), "decoder_layers_per_block": (2, 1, 1, 2)}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    return vaes.ltx(**RESIDUAL | blocks | ratios | config)


def ltx2(**config: Any) -> Any:
    """LTX-2: frames mirrored at their edges."""
    channels = {
        "block_out_channels": (8, 16, 32, 32),
        "decoder_block_out_channels": (16, 32, 64),
        "latent_channels": 16,
    }
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4, "decoder_causal": False}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    return seeded(AutoencoderKLLTX2Video, **channels | layers | ratios | config)


def ltx23() -> Any:
    """Like LTX-2.3: four up blocks, of which one enlarges only time and one only space."""
    types = ("spatiotemporal", "spatiotemporal", "temporal", "spatial")
    blocks = {"decoder_block_out_channels": (16, 32, 32, 64), "decoder_layers_per_block": (1,) * 5}
    scaling = {"decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5}
    factors = {"upsample_type": types, "upsample_residual": (True,) * 4, "upsample_factor": (2, 2, 1, 2)}
    return ltx2(**blocks, **scaling, **factors, decoder_spatial_padding_mode="zeros")


RELEASES: dict[str, Callable[[], Any]] = {
    "0.9.0": ltx_09,
    "0.9.0-causal": lambda: ltx_09(decoder_causal=True),
    "0.9.1": lambda: ltx_095(decoder_layers_per_block=(1, 2, 1, 2)),
    "0.9.5": ltx_095,
    "0.9.5-causal": lambda: ltx_095(decoder_causal=True),
    "2": ltx2,
    "2-causal": lambda: ltx2(decoder_causal=True),
    "2-replicate": lambda: ltx2(decoder_spatial_padding_mode="replicate"),
    "2-timestep": lambda: ltx2(timestep_conditioning=True),
    "2.3": ltx23,
}
MIRRORED = ["2", "2-causal", "2-timestep"]


@cache
def made(name: str) -> tuple[Any, Any]:
    """A VAE, and our decoder with the weights of a copy."""
    vae = RELEASES[name]()
    family = family_of_class(type(vae).__name__)
    assert family is not None
    decoder, note = build_coder(copy.deepcopy(vae), family, Direction.DECODE, "auto", "none")
    assert (decoder.name, note) == ("exact", None)
    return StockDecoder(vae, family), decoder


def arguments(name: str) -> dict[str, float]:
    return TIMESTEP if made(name)[0].vae.config.timestep_conditioning else {}


def latents_of(frames: int, height: int = 2, width: int = 2, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(frames))


def assert_same_as_diffusers(name: str, latents: Tensor, budget: int | None = None) -> None:
    stock, decoder = made(name)
    with torch.inference_mode():
        expected = stock.decode(latents, Layout.SAMPLE, **arguments(name)).tensor
    found = decoder.decode(latents, Layout.SAMPLE, budget_bytes=budget, **arguments(name)).tensor
    assert expected.std() > 0.05  # else anything is close
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7, 19])
@pytest.mark.parametrize("name", RELEASES)
def test_a_video_of_any_length_equals_a_plain_decode(name: str, frames: int) -> None:
    assert_same_as_diffusers(name, latents_of(frames))


@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("name", RELEASES)
def test_chunks_of_any_size_equal_a_plain_decode(
    name: str, frames: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte: each step takes one frame at a time."""
    monkeypatch.setattr(ltx_decoder, "CPU_CHUNK_BYTES", chunk_bytes)
    assert_same_as_diffusers(name, latents_of(frames))


@pytest.mark.parametrize("size", [(5, 3), (3, 7), (2, 9)])
@pytest.mark.parametrize("name", RELEASES)
def test_two_videos_of_any_size_equal_a_plain_decode(name: str, size: tuple[int, int]) -> None:
    assert_same_as_diffusers(name, latents_of(2, *size, batch=2))


@pytest.mark.parametrize("size", [(1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("name", [name for name in RELEASES if name not in MIRRORED])
def test_one_row_or_column_equals_a_plain_decode(name: str, size: tuple[int, int]) -> None:
    assert_same_as_diffusers(name, latents_of(2, *size))


@pytest.mark.parametrize("size", [(1, 3), (3, 1)])
@pytest.mark.parametrize("name", MIRRORED)
def test_one_row_cannot_be_mirrored(name: str, size: tuple[int, int]) -> None:
    stock, decoder = made(name)
    with pytest.raises(RuntimeError, match="Padding size"), torch.inference_mode():
        stock.decode(latents_of(2, *size), Layout.SAMPLE, **arguments(name))
    with pytest.raises(WrongShape, match="at least 2x2"):
        decoder.decode(latents_of(2, *size), Layout.SAMPLE, **arguments(name))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", RELEASES)
def test_the_lowest_slabs_equal_a_plain_decode(name: str, frames: int) -> None:
    """Tall enough that a slab in the middle sees neither edge."""
    plan = made(name)[1].plan(frames, 45, 2, SMALLEST)
    assert (plan.slab_rows, plan.chunk_bytes) == (4, 1)
    assert_same_as_diffusers(name, latents_of(frames, 45, 2), SMALLEST)


@pytest.mark.parametrize("budget", [None, SMALLEST])
@pytest.mark.parametrize("layout", [Layout.UNIT, Layout.PIXELS])
@pytest.mark.parametrize("name", RELEASES)
def test_layouts_are_the_postprocessed_sample(name: str, layout: Layout, budget: int | None) -> None:
    stock, decoder = made(name)
    latents = latents_of(2, 6, 2, batch=2)
    with torch.inference_mode():
        expected = postprocess(stock.decode(latents, Layout.SAMPLE, **arguments(name)).tensor, layout)
    found = decoder.decode(latents, layout, budget_bytes=budget, **arguments(name)).tensor
    atol = 1 if layout is Layout.PIXELS else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("budget", [None, SMALLEST])
@pytest.mark.parametrize("name", RELEASES)
def test_frames_leave_in_order_and_once(name: str, budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ltx_decoder, "CPU_CHUNK_BYTES", 1)
    left: list[Tensor] = []
    found = made(name)[1].decode(
        latents_of(4, 8, 2, batch=2),
        Layout.PIXELS,
        budget_bytes=budget,
        emit=lambda frames, _finite: left.append(frames.clone()),
        **arguments(name),
    )
    assert len(left) > 4
    assert torch.equal(torch.cat(left), found.tensor)


@pytest.mark.parametrize("in_3d", [False, True])
@pytest.mark.parametrize("name", RELEASES)
def test_memory_does_not_grow_with_the_video(name: str, in_3d: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both forms of the convolutions, of which the measurement of this machine chooses one."""
    monkeypatch.setitem(trial._found, ("cpu", torch.float32), in_3d)
    monkeypatch.setattr(ltx_decoder, "CPU_CHUNK_BYTES", 20_000)
    decoder, extra = made.__wrapped__(name)[1], arguments(name)
    short, long = (  # both so long that every step meets its longest chunk
        peak_beside_output(lambda n=n: decoder.decode(latents_of(n), Layout.PIXELS, **extra).tensor) for n in (51, 153)
    )
    assert long < 1.15 * short


def test_a_timestep_matters() -> None:
    decoder = made("0.9.5")[1]
    first, second = (decoder.decode(latents_of(1), Layout.SAMPLE, timestep=t).tensor for t in (0.0, 0.5))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("release", ["0.9.0", "0.9.5", "2"])
def test_the_published_channels_equal_a_plain_decode(release: str) -> None:
    published = {
        "0.9.0": lambda: seeded(AutoencoderKLLTXVideo),
        "0.9.5": lambda: seeded(AutoencoderKLLTXVideo, **RELEASE_095),
        "2": lambda: seeded(AutoencoderKLLTX2Video, **RELEASE_2),
    }
    vae = published[release]()
    vae.encoder = nn.Identity()
    family = family_of_class(type(vae).__name__)
    assert family is not None
    latents = torch.randn(1, 128, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    extra = TIMESTEP if vae.config.timestep_conditioning else {}
    with torch.inference_mode():
        expected = StockDecoder(vae, family).decode(latents, Layout.SAMPLE, **extra).tensor
    decoder: Any = build_coder(vae, family, Direction.DECODE, "auto", "none")[0]
    found = decoder.decode(latents, Layout.SAMPLE, **extra).tensor
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


RELEASE_095: dict[str, Any] = RESIDUAL | {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
RELEASE_2: dict[str, Any] = {
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
PUBLISHED: dict[str, Callable[[], Any]] = {
    "0.9.0": AutoencoderKLLTXVideo,
    "0.9.5": lambda: AutoencoderKLLTXVideo(**RELEASE_095),
    "2": lambda: AutoencoderKLLTX2Video(**RELEASE_2),
    "2-causal": lambda: AutoencoderKLLTX2Video(**RELEASE_2 | {"decoder_causal": True}),
}


@pytest.mark.parametrize(("fraction", "shape"), [(0.8, (3, 8, 12)), (0.4, (2, 64, 2))])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_budget_is_kept_at_the_published_size(
    name: str, shape: tuple[int, int, int], fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tensors that have no data, which are planned as on a GPU. No budget is kept below that of the lowest slabs."""
    with torch.device("meta"):
        vae = PUBLISHED[name]()
        family = family_of_class(type(vae).__name__)
        decoder: Any = build_coder(vae, family, Direction.DECODE, "auto", "none")[0]  # type: ignore[arg-type]  # the family is known

        def peak(budget: int | None) -> int:
            latents = torch.empty(1, 128, *shape)
            return peak_beside_output(lambda: decoder.decode(latents, Layout.PIXELS, budget_bytes=budget).tensor)

        monkeypatch.setattr(ltx_decoder, "GPU_BAND_BYTES", ltx_decoder.CPU_BAND_BYTES)
        budget = max(int(fraction * peak(1 << 60)), decoder.plan(*shape, SMALLEST).peak_bytes)
        assert peak(budget) < budget


def refusal(vae: Any) -> str | None:
    family = family_of_class(type(vae).__name__)
    assert family is not None
    decoder, note = build_coder(vae, family, Direction.DECODE, "auto", "none")
    assert decoder.name == "diffusers"
    return note


def test_noise_that_frames_share_is_left_to_diffusers() -> None:
    vae = ltx_095(decoder_inject_noise=(True, True, True, False))
    assert refusal(vae) == "Its decoder adds noise that all frames of a video share."


def test_edges_from_the_other_side_are_left_to_diffusers() -> None:
    assert refusal(ltx2(decoder_spatial_padding_mode="circular")) == "conv_in pads by circular."


def test_unknown_parts_are_left_to_diffusers() -> None:
    vae = ltx2()
    vae.decoder.up_blocks[1].resnets[0].norm2 = nn.LayerNorm(8)
    assert refusal(vae) == "up_blocks.1.resnets.0.norm2 is not an RMS norm over the channels without weights."
    vae = ltx_09()
    vae.decoder.mid_block.resnets[0].nonlinearity = nn.GELU()
    assert refusal(vae) == "mid_block.resnets.0.nonlinearity is a GELU, not SiLU."
    vae = ltx_09()
    vae.decoder.mid_block.attention = nn.Identity()
    assert refusal(vae) == "mid_block has unknown parts: attention."
