"""Our video encoders against diffusers' plain encode: every family, every length, in slabs and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from torch import Tensor

from benchmarks.families import WAN_22
from server.engine.coders.build import EXACT_CLASSES, build_coder
from server.engine.coders.interface import Stopped
from server.engine.coders.stock import StockEncoder
from server.engine.coders.video import causal_coder
from server.errors import WrongShape
from server.families import Family, family_of_class
from server.model_info import Direction
from tests.engine.coders.image.networks import psnr
from tests.engine.live import peak_beside_output
from tests.pipelines import vaes

pytestmark = pytest.mark.usefixtures("one_core")

SMALLEST = 1  # as a budget: the lowest slabs
AMPLE = 1 << 50
LTX_095: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (4, 6, 6, 2, 2),
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
"""The encoder of LTX-Video since 0.9.5."""
NARROW_095 = LTX_095 | {"block_out_channels": (8, 16, 16, 32, 64), "layers_per_block": (1,) * 5}
LTX_2: dict[str, Any] = {
    "decoder_block_out_channels": (8,) * 3,
    "decoder_layers_per_block": (1,) * 4,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
"""An LTX-2 whose decoder has few layers."""
VIDEOS: dict[str, Callable[[], Any]] = {
    "wan": vaes.wan,
    "wan-2.2-5b": vaes.wan_22,
    "hunyuan-video": vaes.hunyuan_video,
    "hunyuan-video-1.5": vaes.hunyuan_video_15,
    "cogvideox": vaes.cogvideox,
    "easy-animate": vaes.magvit,
    "easy-animate-frames": lambda: vaes.magvit(spatial_group_norm=True),
    "ltx-video": lambda: vaes.ltx(block_out_channels=(8, 16, 16, 32)),
    "ltx-video-0.9.5": lambda: vaes.ltx(**NARROW_095),
    "ltx-2": vaes.ltx2,
    "mochi": lambda: vaes.mochi(encoder_block_out_channels=(32, 32, 64, 64)),
}
IMAGES: dict[str, Callable[[], Any]] = {"qwen-image": vaes.qwen_image, "qwen-image-2.1": vaes.qwen_image_21}
ALL = [*VIDEOS, *IMAGES]
IGNORING = ["wan", "wan-2.2-5b", "ltx-video", "mochi"]  # diffusers ignores frames that fill no chunk
WIDE: dict[str, Any] = {"block_out_channels": [32] * 4, "norm_num_groups": 8}
CHUNKED: dict[str, Callable[[], Any]] = {
    "cogvideox": lambda: vaes.cogvideox(**WIDE),
    "easy-animate": lambda: vaes.magvit(**WIDE),
    "easy-animate-frames": lambda: vaes.magvit(spatial_group_norm=True, **WIDE),
}
"""The families whose norms depend on the chunks, with more channels."""
EASY_ANIMATE_2 = {
    "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 2],
    "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 2],
}
"""The blocks of an EasyAnimate VAE that halves the frames once."""
PUBLISHED: dict[str, Callable[[], Any]] = {
    "wan": AutoencoderKLWan,
    "wan-2.2-5b": lambda: AutoencoderKLWan(**WAN_22),
    "hunyuan-video": AutoencoderKLHunyuanVideo,
    "hunyuan-video-1.5": AutoencoderKLHunyuanVideo15,
    "cogvideox": AutoencoderKLCogVideoX,
    "easy-animate": AutoencoderKLMagvit,
    "easy-animate-frame-norms": lambda: AutoencoderKLMagvit(spatial_group_norm=False),
    "ltx-video": AutoencoderKLLTXVideo,
    "ltx-2": lambda: AutoencoderKLLTX2Video(**LTX_2),  # its encoder has the layers of LTX-Video since 0.9.5
    "mochi": AutoencoderKLMochi,
    "qwen-image": AutoencoderKLQwenImage,
}


SHALLOW = {"ltx-2": lambda: AutoencoderKLLTX2Video(**LTX_2, layers_per_block=(1,) * 5)}
"""With the published channels, but fewer layers: the published encoder has 694 million weights."""


@cache
def made(name: str) -> tuple[Any, Family]:
    """The VAE, with enough contrast in its latents that a wrong neighbour shows, and its family."""
    vae, is_sensitive = (VIDEOS | IMAGES)[name](), name.startswith(("hunyuan", "cogvideox", "easy", "mochi"))
    vae.use_framewise_encoding = False
    vary_norms(vae.encoder, seed=0)
    layer = vae.encoder.proj_out if name == "mochi" else vae.encoder.conv_out
    last = getattr(layer, "conv", layer)
    return vaes.brightened(vae, last, gain=2 if is_sensitive else 8), family_for(vae)


def vary_norms(network: torch.nn.Module, seed: int) -> None:
    """Give the GroupNorms weights that are not all the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)


def family_for(vae: Any) -> Family:
    family = family_of_class(type(vae).__name__)
    assert family is not None
    return family


@cache
def ours(name: str) -> Any:
    """The encoder that runs by default. It takes the weights of its own copy of the VAE."""
    vae, family = made(name)
    return build_coder(copy.deepcopy(vae), family, Direction.ENCODE, "auto", "none")[0]


def stock(name: str, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return StockEncoder(*made(name)).encode(pixels).tensor


def pixels_for(name: str, latent_frames: int, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    """Noise for latents of height x width."""
    return pixels_of(name, (latent_frames - 1) * times_shorter(name) + 1, height, width, batch)


def times_shorter(name: str) -> int:
    """The frames that become one latent frame, except for the first one."""
    vae, family = made(name)
    return family.describe(vae.config).temporal_compression_ratio


def pixels_of(name: str, frames: int, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    """Noise for so many frames of latents of height x width."""
    vae, family = made(name)
    spec = family.describe(vae.config)
    ratio, generator = spec.vae_scale_factor, torch.Generator().manual_seed(frames)
    size = (ratio * height, ratio * width)
    shape = (spec.image_channels, frames, *size) if name in VIDEOS else (spec.image_channels, *size)
    return torch.rand(batch, *shape, generator=generator) * 2 - 1  # [B, C, (F,) H, W]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    assert expected.flatten(2).std(2).mean() > 0.05  # within a channel, else anything is close
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "shape", [(1, 3, 5), (2, 3, 2), (3, 7, 3), (7, 2, 2), (2, 1, 6), (2, 9, 1), (4, 2, 11)], ids=str
)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_of_any_shape_equals_a_plain_encode(name: str, shape: tuple[int, int, int]) -> None:
    """Frames, rows and columns of latents."""
    pixels = pixels_for(name, *shape, batch=2 if shape[0] == 3 else 1)
    assert_same(ours(name).encode(pixels).tensor, stock(name, pixels))


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 7, 3), (4, 2, 11)], ids=str)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_in_the_pieces_of_a_gpu_equals_a_plain_encode(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have many frames; a CPU computes as few frames at a time as it can."""
    monkeypatch.setattr(causal_coder, "CPU_PIECE_BYTES", causal_coder.GPU_PIECE_BYTES)
    test_a_video_of_any_shape_equals_a_plain_encode(name, shape)


@pytest.mark.parametrize("shape", [(1, 6), (9, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_shape_equals_a_plain_encode(name: str, shape: tuple[int, int]) -> None:
    pixels = pixels_for(name, 1, *shape, batch=2)
    assert_same(ours(name).encode(pixels).tensor, stock(name, pixels))


@pytest.mark.parametrize("frames", [2, 4, 7, 12])
@pytest.mark.parametrize("name", IGNORING)
def test_frames_that_fill_no_chunk_are_ignored_as_in_diffusers(name: str, frames: int) -> None:
    pixels = pixels_of(name, frames)
    assert_same(ours(name).encode(pixels).tensor, stock(name, pixels))


@pytest.mark.parametrize("frames", [17, 21, 29, 33])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_are_those_of_diffusers_at_any_length(name: str, frames: int) -> None:
    """The first chunk of CogVideoX has 9 or 13 frames. Norms span a chunk."""
    pixels = pixels_of(name, frames)
    assert_same(ours(name).encode(pixels).tensor, stock(name, pixels))


@pytest.mark.parametrize("kinds", [("conv", "spatial", "temporal"), ("temporal", "conv", "spatiotemporal")], ids=str)
def test_any_order_of_ltx_videos_downsamplers_equals_a_plain_encode(kinds: tuple[str, ...]) -> None:
    """A block with a convolution of stride 2 keeps the number of channels."""
    channels = {"conv": 1, "spatial": 4, "temporal": 2, "spatiotemporal": 2}
    widths = [8]
    for kind in kinds:
        widths.append(widths[-1] * channels[kind])
    config = {"block_out_channels": tuple(widths), "downsample_type": kinds, "layers_per_block": (1,) * 4}
    blocks = {"down_block_types": LTX_095["down_block_types"][:3], "spatio_temporal_scaling": (True,) * 3}
    vae = vaes.ltx(**config, **blocks)
    encoder: Any = build_coder(copy.deepcopy(vae), family_for(vae), Direction.ENCODE, "auto", "none")[0]
    pixels = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1  # [B, C, F, H, W]
    with torch.inference_mode():
        expected = StockEncoder(vae, family_for(vae)).encode(pixels).tensor
    assert_same(encoder.encode(pixels).tensor, expected)


@pytest.mark.parametrize(
    ("make", "frames"),
    [
        (lambda: vaes.cogvideox(temporal_compression_ratio=2), (1, 3, 7, 15, 17)),
        (lambda: vaes.cogvideox(temporal_compression_ratio=8), (1, 9, 17)),
        (lambda: vaes.cogvideox(temporal_compression_ratio=1), (1, 2, 8, 17, 20)),
        (lambda: vaes.magvit(block_out_channels=[8] * 3, **EASY_ANIMATE_2), (1, 3, 7, 9)),
    ],
    ids=["cogvideox-2", "cogvideox-8", "cogvideox-1", "easy-animate-2"],
)
def test_other_temporal_ratios_equal_a_plain_encode(make: Callable[[], Any], frames: tuple[int, ...]) -> None:
    vae = make()
    family, generator = family_for(vae), torch.Generator().manual_seed(0)
    encoder: Any = build_coder(copy.deepcopy(vae), family, Direction.ENCODE, "auto", "none")[0]
    for count in frames:
        pixels = torch.rand(1, 3, count, 24, 16, generator=generator) * 2 - 1  # [B, C, F, H, W]
        with torch.inference_mode():
            expected = StockEncoder(vae, family).encode(pixels).tensor
        assert_same(encoder.encode(pixels).tensor, expected)


@pytest.mark.parametrize("name", [name for name in VIDEOS if name not in IGNORING])
def test_frames_that_diffusers_would_not_ignore_are_refused(name: str) -> None:
    taken = f"this VAE takes {times_shorter(name)} k"
    with pytest.raises(WrongShape, match=f"a video of 6 frames cannot be encoded: {taken}"):
        ours(name).encode(pixels_of(name, 6))


@pytest.mark.parametrize("budget", [None, SMALLEST])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_odd_sizes_equals_a_plain_encode(name: str, budget: int | None) -> None:
    pixels = pixels_for(name, 2, 7, 5, batch=2)
    assert_same(ours(name).encode(pixels, budget_bytes=budget).tensor, stock(name, pixels))


@pytest.mark.parametrize("name", ALL)
def test_slabs_of_rows_equal_a_plain_encode(name: str) -> None:
    """Tall enough that a slab in the middle sees neither edge."""
    height = 36
    pixels = pixels_for(name, 2, height, 1)
    encoder = ours(name)
    assert encoder.plan(2, height, 1, SMALLEST).legs[0].slab_rows == 4
    assert_same(encoder.encode(pixels, budget_bytes=SMALLEST).tensor, stock(name, pixels))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", VIDEOS)
def test_every_budget_gives_the_same_parameters(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets are between the memory of the smallest plan and of the fastest one, with bands that take little."""
    monkeypatch.setattr(causal_coder, "CPU_BAND_BYTES", 1 << 14)
    pixels = pixels_for(name, 3, 32, 2)
    encoder = ours(name)
    smallest, fastest = (encoder.plan(3, 32, 2, budget) for budget in (SMALLEST, AMPLE))
    budget = int(smallest.peak_bytes + share * (fastest.peak_bytes - smallest.peak_bytes))
    assert encoder.plan(3, 32, 2, budget).legs != fastest.legs
    torch.testing.assert_close(
        encoder.encode(pixels, budget_bytes=budget).tensor, encoder.encode(pixels).tensor, atol=5e-5, rtol=0
    )


def gained(vae: Any, videos: list[Tensor]) -> list[float]:
    """How many decibels our bfloat16 is closer to float32 than diffusers' own, for each video."""
    family, half = family_for(vae), copy.deepcopy(vae).to(torch.bfloat16)
    ours_half: Any = build_coder(copy.deepcopy(half), family, Direction.ENCODE, "auto", "none")[0]
    encoders = (StockEncoder(vae, family), ours_half, StockEncoder(half, family))
    gains = []
    for pixels in videos:
        with torch.inference_mode():
            expected, found, theirs = (encoder.encode(pixels.bfloat16()).tensor.float() for encoder in encoders)
        gains.append(psnr(found, expected) - psnr(theirs, expected))
    return gains


@pytest.mark.parametrize("name", [name for name in ALL if name not in CHUNKED])
def test_bfloat16_is_as_close_to_float32_as_diffusers_own(name: str) -> None:
    """The mean over several videos, because one small video changes the result by half a decibel."""
    gains = gained(made(name)[0], [pixels_for(name, frames, 5, 6) for frames in (1, 2, 3, 4, 5)])
    assert sum(gains) / len(gains) >= -0.3


@pytest.mark.parametrize("name", CHUNKED)
def test_bfloat16_with_norms_over_chunks_is_as_close_to_float32_as_diffusers_own(name: str) -> None:
    """The mean over several weights, too: those of one small VAE change the result by half a decibel."""
    gains = []
    for seed in range(5):
        vae = CHUNKED[name]()
        vary_norms(vae.encoder, seed)
        gains += gained(vae, [pixels_for(name, frames, 5, 6) for frames in (1, 2, 3)])
    assert sum(gains) / len(gains) >= -0.3


@pytest.mark.parametrize("name", ALL)
def test_pixels_may_have_another_dtype(name: str) -> None:
    """They are converted a few frames at a time."""
    pixels = pixels_for(name, 2).double()
    assert_same(ours(name).encode(pixels).tensor, stock(name, pixels.float()))


def peak_of(encoder: Any, pixels: Tensor, budget: int | None = None) -> int:
    """The bytes that an encode holds beside its input, which is counted as a view of it is made, and its output."""
    return peak_beside_output(lambda: encoder.encode(pixels[:], budget_bytes=budget).tensor) - pixels.nbytes


@pytest.mark.parametrize("name", [name for name in VIDEOS if name not in ("hunyuan-video", "mochi")])
def test_memory_does_not_grow_with_the_clip(name: str) -> None:
    """Except for keys and values of HunyuanVideo 1.5's attention, which are kept at the latents' size.

    The pixels are float64, so that copies of all of them would show.
    """
    short, long = (peak_of(ours(name), pixels_for(name, frames).double()) for frames in (5, 13))
    assert long < (1.1 if name == "hunyuan-video-1.5" else 1.01) * short


def test_mochis_memory_grows_by_the_keys_and_values_of_its_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bands that take little. The plan says what is remembered of each frame and pixel of the latents."""
    monkeypatch.setattr(causal_coder, "CPU_BAND_BYTES", 1 << 14)
    encoder, height, itemsize = ours("mochi"), 12, 4
    short, long = (peak_of(encoder, pixels_for("mochi", frames, height, 1)) for frames in (5, 13))
    remembered = sum(need.seen for need in encoder.network.needs) * height * itemsize  # of a latent frame
    assert long - short == pytest.approx(8 * remembered, rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_slabs_take_a_fraction_of_the_memory(name: str) -> None:
    pixels = pixels_for(name, 2, 128, 1)
    assert peak_of(ours(name), pixels, SMALLEST) < 0.4 * peak_of(ours(name), pixels)


@pytest.mark.parametrize("share", [0.6, 0.35])
def test_hunyuan_videos_encode_needs_less_than_one_of_its_largest_activations(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is ample, a whole activation is stored twice: its norms span the whole video."""
    monkeypatch.setattr(causal_coder, "CPU_BAND_BYTES", 1 << 16)
    pixels = pixels_for("hunyuan-video", 9, 24, 8)
    largest = pixels.nbytes // 3 * vaes.CHANNELS[0]
    encoder, budget = ours("hunyuan-video"), int(share * largest)
    assert peak_of(encoder, pixels, AMPLE) > 1.5 * largest
    assert peak_of(encoder, pixels, budget) <= budget


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_budget_is_kept_at_the_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have no data; bands and pieces are as small as can be, so that only slabs can save memory.

    LTX-Video's lowest slabs take more than half of the memory, because 22 of the 96 rows of latents around them, on
    either side, have an influence.
    """
    monkeypatch.setattr(causal_coder, "GPU_BAND_BYTES", 2 << 20)
    monkeypatch.setattr(causal_coder, "GPU_PIECE_BYTES", 1)
    with torch.device("meta"):
        vae = PUBLISHED[name]().eval()
        spec = family_for(vae).describe(vae.config)
        encoder: Any = build_coder(vae, family_for(vae), Direction.ENCODE, "auto", "none")[0]
        ratio = spec.vae_scale_factor
        frames = 2 * spec.temporal_compression_ratio + 1
        clip = (1, spec.image_channels, frames, 96 * ratio, 2 * ratio)
        pixels = torch.empty(clip if spec.kind == "video" else (*clip[:2], *clip[3:]))
        held = peak_of(encoder, pixels, AMPLE)
        for share in (0.7, 0.9) if name == "ltx-video" else (0.5, 0.8):
            budget = int(share * held)
            assert peak_of(encoder, pixels, budget) < budget
        fastest = encoder.plan(3 if spec.kind == "video" else 1, 96, 2, AMPLE)
        # The plan of HunyuanVideo, which stores and computes videos whole, counts 12 frames for these 9.
        assert held < fastest.peak_bytes < (1.8 if name == "hunyuan-video" else 1.6) * held


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_channels_equal_a_plain_encode(name: str) -> None:
    torch.manual_seed(0)
    vae = (PUBLISHED | SHALLOW)[name]().eval()
    vae.decoder, vae.use_framewise_encoding, family = torch.nn.Identity(), False, family_for(vae)
    spec = family.describe(vae.config)
    side = 2 * spec.vae_scale_factor
    frames = (1 + spec.temporal_compression_ratio,) if spec.kind == "video" else ()
    pixels = torch.rand(1, spec.image_channels, *frames, side, side) * 2 - 1  # [1, C, (F,) H, W]
    with torch.inference_mode():
        expected = StockEncoder(vae, family).encode(pixels).tensor
    encoder: Any = build_coder(vae, family, Direction.ENCODE, "auto", "none")[0]
    torch.testing.assert_close(encoder.encode(pixels).tensor, expected, atol=5e-5, rtol=0)


def test_an_encode_that_was_stopped_leaves_nothing_behind() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 50:
            raise Stopped

    pixels = pixels_for("wan", 3)
    with pytest.raises(Stopped):
        ours("wan").encode(pixels, check=stop)
    assert_same(ours("wan").encode(pixels).tensor, stock("wan", pixels))


def test_parameters_that_are_not_finite_are_told() -> None:
    pixels = pixels_for("wan", 2)
    assert bool(ours("wan").encode(pixels).finite)
    pixels[0, 0, 4, 0, 0] = torch.nan
    assert not bool(ours("wan").encode(pixels).finite)


@pytest.mark.parametrize("name", ALL)
def test_it_is_what_runs_unless_models_yaml_asks_for_diffusers(name: str) -> None:
    vae, family = made(name)
    copies = {choice: copy.deepcopy(vae) for choice in ("auto", "diffusers")}
    names = [build_coder(each, family, Direction.ENCODE, choice, "none")[0].name for choice, each in copies.items()]
    assert names == ["exact", "diffusers"]
    assert type(vae).__name__ in EXACT_CLASSES[Direction.ENCODE]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("wan", lambda e: setattr(e.down_blocks[0], "nonlinearity", torch.nn.GELU()), "down_blocks.0.nonlinearity"),
        ("wan", lambda e: setattr(e.down_blocks[1].resample[1], "stride", (1, 1)), "down_blocks.1.resample"),
        ("wan-2.2-5b", lambda e: setattr(e.down_blocks[0].downsampler, "mode", "none"), "down_blocks.0.downsampler"),
        ("hunyuan-video", lambda e: setattr(e.conv_in, "pad_mode", "constant"), "encoder.conv_in is not a plain"),
        (
            "hunyuan-video",
            lambda e: setattr(e.down_blocks[0].downsamplers[0].conv.conv, "stride", (1, 1, 2)),
            "encoder.down_blocks.0.downsamplers.0.conv is not a plain causal convolution",
        ),
        ("cogvideox", lambda e: setattr(e.conv_in, "pad_mode", "replicate"), "conv_in pads"),
        ("cogvideox", lambda e: setattr(e.down_blocks[0].resnets[0], "norm1", torch.nn.Identity()), "0.norm1 is not"),
        ("cogvideox", lambda e: setattr(e.down_blocks[0].downsamplers[0].conv, "stride", (1, 1)), "0.downsampler.conv"),
        ("easy-animate", lambda e: setattr(e.down_blocks[1].downsampler.conv, "stride", (2, 2, 1)), "1.downsampler"),
        ("easy-animate", lambda e: setattr(e.mid_block.convs[0], "output_scale_factor", 2), "mid_block.convs.0"),
        ("ltx-video", lambda e: setattr(e.down_blocks[0].downsamplers[0].conv, "stride", (1, 2, 2)), "0.downsampler"),
        ("ltx-video", lambda e: setattr(e.down_blocks[0].conv_out, "norm3", torch.nn.Identity()), "0.conv_out.0.norm3"),
        ("ltx-video-0.9.5", lambda e: setattr(e.down_blocks[0].downsamplers[0], "stride", (1, 2, 1)), "of 1x2x1"),
        (
            "ltx-video-0.9.5",
            lambda e: setattr(e.down_blocks[1].downsamplers[0], "group_size", 4),
            "averages 4 channels",
        ),
        ("ltx-2", lambda e: setattr(e.mid_block.resnets[0].conv1.conv, "padding_mode", "reflect"), "pads by reflect"),
        ("ltx-2", lambda e: setattr(e, "patch_size_t", 2), "patches of more than one frame"),
        (
            "mochi",
            lambda e: setattr(e.down_blocks[0].attentions[0], "is_causal", False),
            "0.attentions.0 is not a causal",
        ),
        ("mochi", lambda e: setattr(e.down_blocks[2].conv_in.conv, "stride", (2, 2, 2)), "down_blocks.2.conv_in.conv"),
        ("mochi", lambda e: setattr(e, "norm_out", torch.nn.Identity()), "norm_out is a Identity"),
        ("hunyuan-video-1.5", lambda e: setattr(e.conv_in, "pad_mode", "constant"), "conv_in pads"),
        ("hunyuan-video-1.5", lambda e: e.down_blocks[0].downsamplers.append(torch.nn.Conv3d(1, 1, 1)), "a Conv3d"),
    ],
)
def test_an_unknown_structure_is_left_to_diffusers(name: str, change: Callable[[Any], None], reason: str) -> None:
    vae, family = copy.deepcopy(made(name)[0]), made(name)[1]
    change(vae.encoder)
    encoder, note = build_coder(vae, family, Direction.ENCODE, "auto", "none")
    assert encoder.name == "diffusers"
    assert reason in str(note)


@pytest.mark.parametrize("name", ["cogvideox", "easy-animate"])
def test_chunks_that_fill_no_latent_frames_are_left_to_diffusers(name: str) -> None:
    vae, family = copy.deepcopy(made(name)[0]), made(name)[1]
    vae.num_sample_frames_batch_size = 6
    encoder, note = build_coder(vae, family, Direction.ENCODE, "auto", "none")
    assert encoder.name == "diffusers"
    assert "It encodes 6 frames at a time, which is not a multiple of 4." in str(note)


@pytest.mark.parametrize("make", [vaes.ltx, vaes.ltx2])
def test_an_encoder_that_is_not_causal_is_left_to_diffusers(make: Callable[..., Any]) -> None:
    vae = make(encoder_causal=False)
    encoder, note = build_coder(vae, family_for(vae), Direction.ENCODE, "auto", "none")
    assert encoder.name == "diffusers"
    assert str(note) == "Its encoder reads frames ahead."
