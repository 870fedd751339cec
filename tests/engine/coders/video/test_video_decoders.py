"""Our video decoders against diffusers' plain decode: every family, every length, in slabs and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from torch import Tensor

from server.engine.coders.build import build_coder
from server.engine.coders.layouts import postprocess
from server.engine.coders.stock import StockDecoder
from server.engine.coders.video import causal_coder, ltx_decoder
from server.families import Family, family_of_class
from server.model_info import Direction
from server.values import Layout
from tests.engine.live import peak_beside_output
from tests.pipelines import vaes

pytestmark = pytest.mark.usefixtures("one_core")

SMALLEST = 1  # as a budget: the lowest slabs
VIDEOS: dict[str, Callable[[], Any]] = {
    "wan": vaes.wan,
    "wan-2.2-5b": vaes.wan_22,
    "hunyuan-video-1.5": vaes.hunyuan_video_15,
    "ltx": vaes.ltx,
    "ltx-causal": lambda: vaes.ltx(decoder_causal=True),
    "ltx-timestep": lambda: vaes.ltx(timestep_conditioning=True),
    "ltx2": vaes.ltx2,
    "cogvideox": vaes.cogvideox,
    "easy-animate": vaes.magvit,
    "easy-animate-frames": lambda: vaes.magvit(spatial_group_norm=True),
    "mochi": vaes.mochi,
}
IMAGES: dict[str, Callable[[], Any]] = {"qwen-image": vaes.qwen_image, "qwen-image-2.1": vaes.qwen_image_21}
LTX = ["ltx", "ltx-causal", "ltx-timestep", "ltx2"]
WHOLE_VIDEO = ["hunyuan-video-1.5", "ltx", "ltx2", "mochi"]  # diffusers decodes these at once


@cache
def made(name: str) -> tuple[Any, Family]:
    vae = (VIDEOS | IMAGES)[name]()
    family = family_of_class(type(vae).__name__)
    assert family is not None
    return vae, family


@cache
def ours(name: str) -> Any:
    """The decoder that runs by default. An exact one takes the weights of its own copy of the VAE."""
    vae, family = made(name)
    return build_coder(copy.deepcopy(vae), family, Direction.DECODE, "auto", "none")[0]


def stock(name: str, latents: Tensor, layout: Layout = Layout.SAMPLE) -> Tensor:
    """A clip at a time: HunyuanVideo 1.5 of diffusers takes no more."""
    decoder = StockDecoder(*made(name))
    with torch.inference_mode():
        samples = [decoder.decode(one, Layout.SAMPLE, **arguments(name)).tensor for one in latents.split(1)]
        return postprocess(torch.cat(samples), layout)


def arguments(name: str) -> dict[str, float]:
    return {"timestep": 0.05} if name == "ltx-timestep" else {}


def latents_for(name: str, frames: int, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    vae, family = made(name)
    channels = family.describe(vae.config).channels
    shape = (channels, frames, height, width) if name in VIDEOS else (channels, height, width)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(frames))  # [B, C, (F,) h, w]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    assert expected.float().std() > 0.05  # else anything is close
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_of_any_length_equals_a_plain_decode(name: str, frames: int) -> None:
    latents = latents_for(name, frames)
    assert_same(ours(name).decode(latents, Layout.SAMPLE, **arguments(name)).tensor, stock(name, latents))


@pytest.mark.parametrize("frames", [2, 5, 6])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_in_the_chunks_of_a_gpu_equals_a_plain_decode(
    name: str, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have many frames; a CPU computes as few frames at a time as it can."""
    monkeypatch.setattr(causal_coder, "CPU_PIECE_BYTES", causal_coder.GPU_PIECE_BYTES)
    monkeypatch.setattr(ltx_decoder, "CPU_CHUNK_BYTES", ltx_decoder.GPU_CHUNK_BYTES)
    test_a_clip_of_any_length_equals_a_plain_decode(name, frames)


@pytest.mark.parametrize("name", IMAGES)
def test_pictures_equal_a_plain_decode(name: str) -> None:
    latents = latents_for(name, 1, 4, 5, batch=2)
    assert_same(ours(name).decode(latents, Layout.SAMPLE).tensor, stock(name, latents))


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_slabs_of_rows_equal_a_plain_decode(name: str) -> None:
    """Tall enough that a slab in the middle sees neither edge."""
    latents = latents_for(name, 2, 44, 2)
    decoder = ours(name)
    assert decoder.plan(2, 44, 2, SMALLEST).slab_rows == 4
    found = decoder.decode(latents, Layout.SAMPLE, budget_bytes=SMALLEST, **arguments(name))
    assert_same(found.tensor, stock(name, latents))


@pytest.mark.parametrize("budget", [None, SMALLEST])
@pytest.mark.parametrize("layout", [Layout.UNIT, Layout.PIXELS])
@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_layouts_are_the_postprocessed_sample(name: str, layout: Layout, budget: int | None) -> None:
    latents = latents_for(name, 2, 5, 2, batch=2)
    found = ours(name).decode(latents, layout, budget_bytes=budget, **arguments(name)).tensor
    expected = stock(name, latents, layout)
    assert found.dtype is expected.dtype
    atol = 1 if layout is Layout.PIXELS else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("budget", [None, SMALLEST])
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_leave_in_order_and_once(name: str, budget: int | None) -> None:
    left: list[Tensor] = []
    latents = latents_for(name, 6, 8, 2, batch=2)

    def emit(frames: Tensor, _finite: Tensor) -> None:
        left.append(frames.clone())

    found = ours(name).decode(latents, Layout.PIXELS, budget_bytes=budget, emit=emit, **arguments(name))
    assert len(left) > 2
    assert torch.equal(torch.cat(left), found.tensor)


@pytest.mark.parametrize("name", VIDEOS)
def test_memory_does_not_grow_with_the_clip(name: str) -> None:
    """Beside the output; keys and values of HunyuanVideo 1.5's attention are kept, at the latents' size."""
    frames = (33, 65) if name in LTX else (5, 13)  # small frames of LTX are decoded 32 at a time
    decoder = ours(name)
    short, long = (
        peak_beside_output(lambda n=n: decoder.decode(latents_for(name, n), Layout.PIXELS, **arguments(name)).tensor)
        for n in frames
    )
    assert long < 1.1 * short


@pytest.mark.parametrize("name", WHOLE_VIDEO)
def test_memory_is_a_fraction_of_a_plain_decode(name: str) -> None:
    latents = latents_for(name, 33 if name in LTX else 13)
    held = peak_beside_output(lambda: ours(name).decode(latents, Layout.PIXELS).tensor)
    theirs = peak_beside_output(lambda: stock(name, latents, Layout.PIXELS))
    assert held < 0.5 * theirs


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_slabs_take_a_fraction_of_the_memory(name: str) -> None:
    latents = latents_for(name, 2, 128, 2)
    decoder = ours(name)
    whole, lowest = (
        peak_beside_output(
            lambda b=budget: decoder.decode(latents, Layout.PIXELS, budget_bytes=b, **arguments(name)).tensor
        )
        for budget in (None, SMALLEST)
    )
    assert lowest < 0.35 * whole


@pytest.mark.parametrize("make", [AutoencoderKLWan, AutoencoderKLQwenImage])
def test_a_single_frame_takes_less_than_three_of_its_largest_activations(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of it for later frames. At the published size, with tensors that have no data."""
    monkeypatch.setattr(causal_coder, "GPU_BAND_BYTES", 2 << 20)
    with torch.device("meta"):
        vae = make().eval()
        decoder: Any = build_coder(vae, family_of_class(type(vae).__name__), Direction.DECODE, "auto", "none")[0]
        latents = torch.empty((1, 16, 1, 128, 128) if make is AutoencoderKLWan else (1, 16, 128, 128))
        held = peak_beside_output(lambda: decoder.decode(latents, Layout.PIXELS).tensor)
    assert held < 3 * 4 * 1024 * 1024 * 96  # float32, 96 channels at the size of the image


@pytest.mark.parametrize("make", [AutoencoderKLWan, AutoencoderKLHunyuanVideo15, AutoencoderKLLTXVideo])
def test_a_budget_is_kept_at_the_published_size(make: Callable[[], Any]) -> None:
    """With tensors that have no data."""
    with torch.device("meta"):
        vae = make().eval()
        family = family_of_class(type(vae).__name__)
        assert family is not None
        channels = family.describe(vae.config).channels
        decoder, _ = build_coder(vae, family, Direction.DECODE, "auto", "none")
        latents = torch.empty(1, channels, 5, 96, 2)  # a slab of four rows has up to 32 more around it
        whole = peak_beside_output(lambda: decoder.decode(latents, Layout.PIXELS).tensor)
        budget = int(0.5 * whole)
        assert peak_beside_output(lambda: decoder.decode(latents, Layout.PIXELS, budget_bytes=budget).tensor) < budget


@pytest.mark.parametrize("name", VIDEOS)
def test_a_decode_that_broke_off_leaves_nothing_behind(name: str) -> None:
    def full(frames: Tensor, finite: Tensor) -> None:
        raise RuntimeError("out of memory")

    latents = latents_for(name, 3)
    before = stock(name, latents)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours(name).decode(latents, Layout.SAMPLE, emit=full, **arguments(name))
    assert_same(ours(name).decode(latents, Layout.SAMPLE, **arguments(name)).tensor, before)
    assert torch.equal(stock(name, latents), before)


def test_a_sample_that_is_not_finite_is_told() -> None:
    decoder = ours("wan")
    assert bool(decoder.decode(latents_for("wan", 2), Layout.PIXELS).finite)
    assert not bool(decoder.decode(latents_for("wan", 2) * torch.nan, Layout.PIXELS).finite)


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_it_is_what_runs_unless_models_yaml_asks_for_diffusers(name: str) -> None:
    vae, family = made(name)
    copies = {choice: copy.deepcopy(vae) for choice in ("auto", "diffusers")}
    names = [build_coder(each, family, Direction.DECODE, choice, "none")[0].name for choice, each in copies.items()]
    assert names == ["exact", "diffusers"]
