"""The exact decoder of HunyuanVideo against diffusers' untiled one: every budget, every shape."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.coders.layouts import postprocess
from server.engine.coders.video import causal_coder
from server.engine.coders.video.causal_decoder import ExactCausalDecoder
from server.values import Layout
from tests.engine.coders.image.networks import psnr
from tests.engine.live import peak_beside_output


def build(dtype: torch.dtype = torch.float32, **changes: object) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    config = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, **changes}
    vae = AutoencoderKLHunyuanVideo(**config)
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            module.bias.data.normal_(0, 0.2)
    vae.use_framewise_decoding = False
    return torch.nn.Module.to(vae.eval(), dtype)


VAE = build()
OURS = ExactCausalDecoder(copy.deepcopy(VAE))


def latents_for(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * frames + 10 * height + width)
    return torch.randn(batch, 16, frames, height, width, generator=generator)  # [B, C, F, h, w]


def stock(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]  # [B, C, F, H, W]


def exact(vae: AutoencoderKLHunyuanVideo) -> ExactCausalDecoder:
    return ExactCausalDecoder(copy.deepcopy(vae))


SHAPES = [(1, 1, 4, 4), (1, 2, 4, 6), (1, 5, 3, 5), (2, 3, 4, 4), (1, 6, 1, 7), (1, 4, 9, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_diffusers_untiled_decode(shape: tuple[int, int, int, int]) -> None:
    latents = latents_for(*shape)
    sample = OURS.decode(latents, Layout.SAMPLE).tensor
    torch.testing.assert_close(sample, stock(VAE, latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_of_a_gpu_equal_diffusers_untiled_decode(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have many frames; a CPU computes as few frames at a time as it can."""
    monkeypatch.setattr(causal_coder, "CPU_PIECE_BYTES", causal_coder.GPU_PIECE_BYTES)
    test_float32_equals_diffusers_untiled_decode(shape)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 5), st.integers(1, 1 << 23))
def test_any_budget_gives_the_same_video(frames: int, height: int, width: int, budget: int) -> None:
    latents = latents_for(1, frames, height, width)
    sample = OURS.decode(latents, Layout.SAMPLE, budget_bytes=budget).tensor
    torch.testing.assert_close(sample, OURS.decode(latents, Layout.SAMPLE).tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [Layout.UNIT, Layout.PIXELS])
def test_layouts_are_the_postprocessed_sample(layout: Layout) -> None:
    latents = latents_for(1, 3, 4, 5)
    expected = postprocess(stock(VAE, latents), layout)
    found = OURS.decode(latents, layout, budget_bytes=1).tensor
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


def test_less_memory_costs_time() -> None:
    """Whole activations are stored where they fit; else statistics are collected by computing them again."""
    ample, scarce = OURS.plan(9, 64, 64, 1 << 40), OURS.plan(9, 64, 64, 100 << 20)
    assert all(leg.slab_rows is None for leg in ample.legs)
    assert len(scarce.legs) < len(ample.legs)
    assert scarce.peak_bytes <= 100 << 20 < ample.peak_bytes


@pytest.mark.parametrize("share", [0.6, 0.35])
def test_a_plan_keeps_its_budget(share: float) -> None:
    latents = latents_for(1, 9, 32, 32)
    whole = peak_beside_output(lambda: OURS.decode(latents, Layout.PIXELS).tensor)
    budget = int(share * whole)
    assert peak_beside_output(lambda: OURS.decode(latents, Layout.PIXELS, budget_bytes=budget).tensor) <= budget


def test_an_unknown_structure_is_a_reason() -> None:
    assert ExactCausalDecoder.unsupported_reason(VAE) is None
    changed = build()
    changed.decoder.up_blocks[0].resnets[0].nonlinearity = torch.nn.GELU()
    assert "up_blocks.0.resnets.0.nonlinearity is a GELU" in str(ExactCausalDecoder.unsupported_reason(changed))
    changed = build()
    changed.decoder.conv_in.pad_mode = "constant"
    assert "conv_in is not a plain causal convolution" in str(ExactCausalDecoder.unsupported_reason(changed))
