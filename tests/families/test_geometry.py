"""Which latents a family takes, and what size comes out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.contract import Parameters
from server.errors import TooLarge, WrongChannels, WrongShape
from server.families import FAMILIES, check_limits
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
