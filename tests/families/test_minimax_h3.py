"""MiniMax-H3's VAE: what stays in float32, and what its tiles and pixels are in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3

from server.config import ModelEntry
from server.engine.coders.build import build_coder
from server.engine.weights.config_json import read_info
from server.engine.weights.hub import Source
from server.engine.weights.loading import load_vae
from server.families import FAMILIES
from server.model_info import Direction
from server.values import Layout
from tests.pipelines import vaes
from tests.pipelines.by_hand import IMAGENET
from tests.pipelines.sample import noise

pytestmark = pytest.mark.usefixtures("one_core")
FAMILY = FAMILIES["minimax_h3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vaes.minimax_h3().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def load(folder: Path, dtype: torch.dtype, direction: Direction) -> torch.nn.Module:
    source = Source("h3", ModelEntry(repo=str(folder)), folder)
    return load_vae(read_info(source), source, dtype, direction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", Direction)
def test_the_same_tensors_stay_in_float32_as_with_diffusers(
    folder: Path, dtype: torch.dtype, direction: Direction
) -> None:
    reference = AutoencoderKLMiniMaxH3.from_pretrained(folder, torch_dtype=dtype)
    expected = {
        name: (tensor.dtype, tensor) for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]
    }
    loaded = load(folder, dtype, direction)
    found = {
        name: tensor for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()] if not tensor.is_meta
    }
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: expected[name][0] for name in found}
    assert all(torch.equal(tensor, expected[name][1]) for name, tensor in found.items())
    if direction is Direction.DECODE:
        assert {tensor.dtype for tensor in found.values()} == {torch.float32, dtype}


@pytest.mark.parametrize("tiling", ["auto", "diffusers"])
def test_half_precision_pixels_are_those_of_diffusers_in_its_tiles(folder: Path, tiling: str) -> None:
    """320 rows are two tiles. The pixels of the VAE become those of a picture in float32."""
    latents = noise(1, 8, 7, 20, 3)
    reference = AutoencoderKLMiniMaxH3.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in IMAGENET)
    decoder, _ = build_coder(load(folder, torch.bfloat16, Direction.DECODE), FAMILY, Direction.DECODE, "auto", tiling)
    with torch.no_grad():
        whole = (reference.decode(latents).sample.float() * std + mean).clamp(0, 1)
        reference.disable_tiling()
        untiled = (reference.decode(latents).sample.float() * std + mean).clamp(0, 1)
        pixels = decoder.decode(latents, Layout.PIXELS).tensor  # [F, H, W, 3]
    expected = (255 * whole[0].movedim(0, -1)).round()
    assert (pixels.float() - expected).abs().max() <= 1
    assert (255 * (whole - untiled)).abs().max() > 5, "the test must see tiles"
