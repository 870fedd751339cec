"""The exact HunyuanVideo decoder against diffusers' untiled one: every chunk length, every shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.coders.build import build_coder
from server.engine.coders.layouts import postprocess
from server.engine.coders.video import hunyuan_decoder as hunyuan_video
from server.engine.coders.video.hunyuan_decoder import ExactHunyuanVideoDecoder
from server.engine.coders.video.hunyuan_encoder import ExactHunyuanVideoEncoder
from server.families import FAMILIES
from server.model_info import Direction
from server.values import Layout
from tests.engine.coders.image.networks import psnr
from tests.engine.live import peak_beside_output


def build(dtype: torch.dtype = torch.float32, **changes: object) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    config = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, **changes}
    vae = AutoencoderKLHunyuanVideo(**config)
    for module in (*vae.decoder.modules(), *vae.encoder.modules()):
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            module.bias.data.normal_(0, 0.2)
    vae.use_framewise_decoding = vae.use_framewise_encoding = False
    return torch.nn.Module.to(vae.eval(), dtype)


VAE = build()


def latents_for(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * frames + 10 * height + width)
    return torch.randn(batch, 16, frames, height, width, generator=generator)  # [B, C, F, h, w]


def stock(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]  # [B, C, F, H, W]


def exact(vae: AutoencoderKLHunyuanVideo, chunk_bytes: int | None = None) -> ExactHunyuanVideoDecoder:
    decoder = ExactHunyuanVideoDecoder(copy.deepcopy(vae))
    if chunk_bytes is not None:
        decoder._chunk_bytes = lambda frames, pixels, budget_bytes: chunk_bytes
    return decoder


def pixels_for(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * frames + 10 * height + width)
    return torch.rand(batch, 3, frames, 8 * height, 8 * width, generator=generator) * 2 - 1  # [B, 3, F, H, W]


def encoded(vae: AutoencoderKLHunyuanVideo, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.encode(pixels.to(vae.dtype), return_dict=False)[0].parameters  # [B, 2 C, f, h, w]


SHAPES = [(1, 1, 4, 4), (1, 2, 4, 6), (1, 5, 3, 5), (2, 3, 4, 4), (1, 6, 1, 7), (1, 4, 9, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_diffusers_untiled_decode(shape: tuple[int, int, int, int]) -> None:
    latents = latents_for(*shape)
    sample = exact(VAE).decode(latents, Layout.SAMPLE).tensor
    torch.testing.assert_close(sample, stock(VAE, latents), atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 1 << 18))
def test_any_chunk_length_gives_the_same_clip(frames: int, height: int, width: int, chunk_bytes: int) -> None:
    latents = latents_for(1, frames, height, width)
    sample = exact(VAE, chunk_bytes).decode(latents, Layout.SAMPLE).tensor
    torch.testing.assert_close(sample, exact(VAE, 1 << 30).decode(latents, Layout.SAMPLE).tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [Layout.UNIT, Layout.PIXELS])
def test_layouts_are_the_postprocessed_sample(layout: Layout) -> None:
    latents = latents_for(1, 3, 4, 5)
    expected = postprocess(stock(VAE, latents), layout)
    found = exact(VAE, 1).decode(latents, layout).tensor
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=1 if layout is Layout.PIXELS else 1e-4, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_diffusers_own() -> None:
    """Over four clips: one small clip alone moves either figure by half a decibel."""
    half = build(torch.bfloat16)
    decoder, ours, theirs = exact(half), 0.0, 0.0
    for seed in range(4):
        latents = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
        reference = stock(VAE, latents)
        ours += psnr(decoder.decode(latents, Layout.SAMPLE).tensor, reference) / 4
        theirs += psnr(stock(half, latents), reference) / 4
    assert ours >= theirs - 0.3


def test_without_attention_and_with_other_widths() -> None:
    vae = build(mid_block_add_attention=False, block_out_channels=(8, 16, 16, 32), layers_per_block=2)
    latents = latents_for(1, 3, 4, 4)
    torch.testing.assert_close(exact(vae).decode(latents, Layout.SAMPLE).tensor, stock(vae, latents), atol=1e-4, rtol=0)


def test_a_budget_shortens_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ExactHunyuanVideoDecoder(copy.deepcopy(VAE))
    assert decoder._chunk_bytes(17, 256 * 256, budget_bytes=1) == 1
    assert decoder._chunk_bytes(17, 256 * 256, budget_bytes=None) == hunyuan_video.CPU_CHUNK_BYTES


def test_an_unknown_structure_is_a_reason() -> None:
    assert ExactHunyuanVideoDecoder.unsupported_reason(VAE) is None
    assert "is not an AutoencoderKLHunyuanVideo" in str(
        ExactHunyuanVideoDecoder.unsupported_reason(torch.nn.Identity())
    )
    changed = build()
    changed.decoder.up_blocks[0].resnets[0].nonlinearity = torch.nn.GELU()
    assert "up_blocks.0.resnets.0.nonlinearity is a GELU" in str(ExactHunyuanVideoDecoder.unsupported_reason(changed))
    changed = build()
    changed.decoder.conv_in.pad_mode = "constant"
    assert "conv_in is not a plain causal convolution" in str(ExactHunyuanVideoDecoder.unsupported_reason(changed))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 17, 1 << 30])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 5, 3, 5), (1, 9, 4, 3), (1, 25, 2, 3), (1, 6, 3, 3)])
def test_float32_equals_diffusers_untiled_encode(
    shape: tuple[int, int, int, int], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 frames are more than diffusers' temporal tile of 16."""
    monkeypatch.setattr(hunyuan_video, "CPU_CHUNK_BYTES", chunk_bytes)
    encoder, pixels = ExactHunyuanVideoEncoder(copy.deepcopy(VAE)), pixels_for(*shape)
    expected = encoded(VAE, pixels)
    assert expected.flatten(2).std(2).mean() > 0.05
    torch.testing.assert_close(encoder.encode(pixels).tensor, expected, atol=1e-4, rtol=0)


def test_an_encode_needs_no_mask_over_pairs_of_positions() -> None:
    """diffusers' mask of 1,440 positions and the scores hold 8 MB each."""
    pixels = pixels_for(1, 37, 12, 12)
    encoder = ExactHunyuanVideoEncoder(copy.deepcopy(VAE))
    largest = pixels.nbytes // 3 * 16  # an activation of 16 channels
    assert peak_beside_output(lambda: encoder.encode(pixels, budget_bytes=1).tensor) < pixels.nbytes + 2.5 * largest


def test_the_encoder_is_chosen_unless_models_yaml_asks_for_diffusers() -> None:
    family, pixels, vae = FAMILIES["hunyuan_video"], pixels_for(1, 25, 2, 2), build()
    vae.use_framewise_encoding = True  # as diffusers' class sets it
    ours, _ = build_coder(copy.deepcopy(vae), family, Direction.ENCODE, "auto", "none")
    theirs: Any = build_coder(copy.deepcopy(vae), family, Direction.ENCODE, "diffusers", "none")[0]
    assert (ours.name, theirs.name) == ("exact", "diffusers")
    assert torch.equal(theirs.encode(pixels).tensor, encoded(vae, pixels))


def test_an_unknown_encoder_is_a_reason() -> None:
    assert ExactHunyuanVideoEncoder.unsupported_reason(VAE) is None
    changed = build()
    changed.encoder.down_blocks[0].downsamplers[0].conv.conv.stride = (1, 1, 2)
    reason = str(ExactHunyuanVideoEncoder.unsupported_reason(changed))
    assert "encoder.down_blocks.0.downsamplers.0.conv is not a plain causal convolution" in reason
