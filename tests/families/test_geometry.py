"""Which latents a family takes, and what size comes out."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.configuration_utils import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from server.contract import Parameters
from server.engine.weights.defaults import whole_config
from server.errors import BadRequest, Impossible, TooLarge, WrongChannels, WrongShape
from server.families import FAMILIES, check_limits
from server.families.ltx2_diffusion import least_size
from server.model_info import Limits

KL = FAMILIES["kl"].describe({"latent_channels": 16, "block_out_channels": [8, 8, 8, 8]})
VIDEO = FAMILIES["hunyuan_video"].describe(
    {"latent_channels": 16, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
)


def sent(size: tuple[int, int] | None) -> Parameters:
    return Parameters(zip(("height", "width"), map(str, size), strict=True) if size else [])


def kl(*shape: int, size: tuple[int, int] | None = None) -> tuple[tuple[int, ...], bool, int, int]:
    found = FAMILIES["kl"].decode_geometry(KL, shape, sent(size))
    return found.latent_shape, found.is_packed, found.height, found.width


def test_unpacked_latents() -> None:
    assert kl(2, 16, 8, 12) == ((2, 16, 8, 12), False, 64, 96)
    assert kl(16, 8, 12) == ((1, 16, 8, 12), False, 64, 96)


def test_packed_latents() -> None:
    assert kl(2, 24, 64, size=(64, 96)) == ((2, 16, 8, 12), True, 64, 96)
    assert kl(1, 24, 64, size=(70, 111)) == ((1, 16, 8, 12), True, 64, 96), (
        "floored to whole patches, as diffusers does"
    )


def test_a_last_axis_of_4c_alone_is_not_packed() -> None:
    assert kl(16, 64, 64, size=(512, 512)) == ((1, 16, 64, 64), False, 512, 512)
    assert kl(16, 64, 64) == ((1, 16, 64, 64), False, 512, 512)
    assert kl(16, 1024, 64, size=(512, 512)) == ((16, 16, 64, 64), True, 512, 512), "a packed batch of 16"


def test_the_factors_of_wan_follow_from_its_halvings_in_a_diffusers_that_does_not_name_them() -> None:
    halvings = {"temperal_downsample": [False, True, True], "z_dim": 16}
    assert FAMILIES["wan"].scale_factors(halvings) == (8, 4)
    named = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    assert FAMILIES["wan"].scale_factors(halvings | named) == (16, 4)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_packed_and_unpacked_agree(rows: int, columns: int, batch: int) -> None:
    height, width = 16 * rows, 16 * columns
    assert kl(batch, rows * columns, 64, size=(height, width))[2:] == kl(batch, 16, 2 * rows, 2 * columns)[2:]


def test_videos_grow_in_time() -> None:
    for frames, expected in [(1, 1), (2, 5), (16, 61)]:
        found = FAMILIES["hunyuan_video"].decode_geometry(
            VIDEO, (1, 16, frames, 40, 64), Parameters([("height", "nonsense")])
        )
        assert (found.num_frames, found.height, found.width) == (expected, 320, 512)
    assert FAMILIES["hunyuan_video"].decode_geometry(VIDEO, (16, 3, 4, 4), Parameters([])).latent_shape == (
        1,
        16,
        3,
        4,
        4,
    )


@pytest.mark.parametrize("shape", [(4,), (16, 16), (1, 4, 8, 8), (1, 16, 1, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WrongShape):
        kl(*shape)


def test_limits_are_inclusive() -> None:
    geometry = FAMILIES["kl"].decode_geometry(KL, (2, 16, 8, 8), Parameters([]))
    check_limits(geometry, Limits(max_pixels=64 * 64, max_batch=2), "m")
    with pytest.raises(TooLarge, match="64x64 is 4096 pixels, but 'm' takes at most 4095"):
        check_limits(geometry, Limits(max_pixels=4095), "m")


@pytest.mark.parametrize(
    ("family", "config", "shape", "words"),
    [
        ("wan", {"z_dim": 16, "temperal_downsample": [True, True, False]}, (1, 3, 8, 8, 16), r"send \[B, 16, F, H, W\], in torch latents.permute\(0, 4, 1, 2, 3\)"),
        ("wan", {"z_dim": 16, "temperal_downsample": [True, True, False]}, (3, 8, 8, 16), r"send \[16, F, H, W\], in torch latents.permute\(3, 0, 1, 2\)"),
        ("stable_video", {"latent_channels": 4, "block_out_channels": [8] * 4}, (1, 3, 8, 8, 4), r"send \[B, 4, F, H, W\]"),
        ("kl", {"latent_channels": 4, "block_out_channels": [8] * 4}, (1, 64, 64, 4), r"send \[B, 4, H, W\]"),
        ("dc", {"latent_channels": 32, "encoder_block_out_channels": [8] * 6}, (8, 8, 32), r"send \[32, H, W\]"),
    ],
)  # fmt: skip
def test_channels_last_latents_are_described_as_such(
    family: str, config: dict[str, Any], shape: Any, words: str
) -> None:
    spec = FAMILIES[family].describe(config)
    with pytest.raises(WrongShape, match=words) as caught:
        FAMILIES[family].decode_geometry(spec, shape, Parameters([]))
    assert not isinstance(caught.value, WrongChannels), "or other models would be named that take such a shape"


H3 = FAMILIES["minimax_h3"].describe(
    {
        "latent_channels": 24,
        "clip_length": 17,
        "token_drop": 3,
        "spatial_downsample_factors": (2, 2, 2, 2, 1, 1),
        "temporal_downsample_factors": (1, 2, 2, 1, 1, 1),
    }
)


@pytest.mark.parametrize(("latent_frames", "frames"), [(7, 22), (12, 39), (37, 124)])
def test_minimax_h3_has_17_frames_for_each_5_latent_frames(latent_frames: int, frames: int) -> None:
    family = FAMILIES["minimax_h3"]
    assert family.decode_geometry(H3, (1, 24, latent_frames, 8, 12), Parameters([])).num_frames == frames
    assert family.encode_geometry(H3, 1, frames, 128, 192).latent_shape == (1, 24, latent_frames, 8, 12)


@pytest.mark.parametrize("latent_frames", [1, 2, 6, 8, 11, 13])
def test_minimax_h3_refuses_other_numbers_of_latent_frames(latent_frames: int) -> None:
    with pytest.raises(WrongShape, match=r"takes 5 n \+ 2 latent frames, which are 17 n \+ 5 frames; send (7|12) or "):
        FAMILIES["minimax_h3"].decode_geometry(H3, (1, 24, latent_frames, 8, 12), Parameters([]))


@pytest.mark.parametrize("frames", [2, 5, 17, 21, 23, 38])
def test_minimax_h3_refuses_other_numbers_of_frames(frames: int) -> None:
    with pytest.raises(Impossible, match=r"takes one image or 17 n \+ 5 frames; send 22 or 39"):
        FAMILIES["minimax_h3"].encode_geometry(H3, 1, frames, 128, 192)
    assert FAMILIES["minimax_h3"].encode_geometry(H3, 1, 1, 128, 192).latent_shape == (1, 24, 1, 8, 12)


def test_a_minimax_h3_of_other_clips_is_not_described() -> None:
    with pytest.raises(ValueError, match="clip_length must be 17 and token_drop 3"):
        FAMILIES["minimax_h3"].describe({"clip_length": 33, "token_drop": 3})


KVAE_VIDEO = FAMILIES["kvae_video"].describe({"z_channels": 16, "ch_mult": (1, 2, 4, 8), "temporal_compress_times": 4})


@given(st.integers(1, 40))
def test_kvae_is_refused_what_diffusers_decodes_to_too_few_frames(latent_frames: int) -> None:
    def decode() -> int:
        return (
            FAMILIES["kvae_video"].decode_geometry(KVAE_VIDEO, (1, 16, latent_frames, 4, 4), Parameters([])).num_frames
        )

    if latent_frames > 2 and latent_frames % 4 == 2:
        with pytest.raises(WrongShape, match=f"send {latent_frames - 1} or {latent_frames + 1} latent frames"):
            decode()
    else:
        assert decode() == 4 * (latent_frames - 1) + 1


def test_a_diffusion_decoder_takes_a_seed_and_steps() -> None:
    family = FAMILIES["ltx2_diffusion"]
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    spec = family.describe({"latent_channels": 128, **ratios})
    assert spec.takes_seed
    assert not spec.has_encoder

    def arguments(**parameters: Any) -> dict[str, float]:
        sent = Parameters([(key, str(value)) for key, value in parameters.items()])
        return dict(family.decode_geometry(spec, (1, 128, 3, 7, 7), sent).arguments)

    assert arguments() == {"seed": 0}
    assert arguments(seed=2**64 - 1, decode_steps=4) == {"seed": 2**64 - 1, "num_inference_steps": 4}
    for steps in (0, 101):
        with pytest.raises(BadRequest, match="decode_steps must be between 1 and 100"):
            arguments(decode_steps=steps)


def test_the_shipped_diffusion_decoder_needs_three_latent_frames_of_seven_by_seven() -> None:
    assert least_size(FrozenDict(whole_config("LTX2VideoDiffusionDecoderModel", {}))) == (3, 7, 7)
