"""A CPU's statistics are as exact as diffusers', whatever the mean of an activation."""

from __future__ import annotations

import pytest
import torch

from server.engine.kernels.cpu import CpuKernels
from server.engine.kernels.moments import GroupNorm

CHANNELS, GROUPS, EPS = 96, 8, 1e-6


@pytest.mark.parametrize("width", [64, 70, 71])
@pytest.mark.parametrize("mean", [0, 10, 100, 1000, 10_000])
def test_a_norm_is_as_exact_as_diffusers(mean: float, width: int) -> None:
    """Over some seeds, because rounding is a matter of luck."""
    kernels, norm = CpuKernels(torch.float32), GroupNorm(GROUPS, EPS, torch.ones(CHANNELS), torch.zeros(CHANNELS))
    ours = theirs = 0.0
    for seed in range(4):
        x = torch.randn(1, 80, width, CHANNELS, generator=torch.Generator().manual_seed(seed)) + mean  # [B, H, W, C]
        grouped = x.double().unflatten(3, (GROUPS, -1))  # [B, H, W, G, C / G]
        variance, centre = torch.var_mean(grouped, (1, 2, 4), correction=0, keepdim=True)
        expected = ((grouped - centre) / (variance + EPS).sqrt()).flatten(3)
        affine = norm.affine([kernels.moments(x[:, top : top + 16], 8) for top in range(0, 80, 16)])
        got = torch.empty_like(x)
        kernels.normalize(x, affine, got, silu=False)
        image = x.permute(0, 3, 1, 2).contiguous()  # [B, C, H, W]
        stock = torch.nn.functional.group_norm(image, GROUPS, eps=EPS).permute(0, 2, 3, 1)
        ours += float((got - expected).abs().max())
        theirs += float((stock - expected).abs().max())
    assert ours < 2 * theirs
