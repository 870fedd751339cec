"""Attention block by block is diffusers' FlexAttention, and needs no mask of all pairs of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention

from server.engine.coders.neighborhood import BLOCK, NeighborhoodAttention
from tests.pipelines.sample import noise, quiet, seeded

# Grids with one block, with a last block of one token, and with windows as large as the grid.
GRIDS = [
    ((3, 5, 7), (3, 5, 7)),
    ((5, 9, 17), (3, 5, 5)),
    ((9, 8, 8), (5, 3, 7)),
    ((4, 16, 9), (2, 4, 6)),
]


def attention(kernel: Any) -> Any:
    return seeded(LTX2VideoVaeNeighborhoodAttention, dim=32, kernel_size=kernel, head_dim=16)


@pytest.mark.parametrize(("grid", "kernel"), GRIDS)
def test_it_is_what_diffusers_computes(grid: tuple[int, int, int], kernel: tuple[int, int, int]) -> None:
    attend = attention(kernel)
    tokens = noise(2, *grid, 32)
    with torch.no_grad(), quiet():
        expected = attend(tokens)
        attend.set_processor(NeighborhoodAttention())
        torch.testing.assert_close(attend(tokens), expected, atol=1e-6, rtol=0)


def test_no_call_attends_to_more_keys_than_a_block_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, kernel = (12, 24, 24), (3, 5, 5)
    most = [size + window - 1 for size, window in zip(BLOCK, kernel, strict=True)]
    attend = attention(kernel)
    attend.set_processor(NeighborhoodAttention())
    keys: list[int] = []
    computed = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        keys.append(key.shape[-2])
        return computed(query, key, *others, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        attend(noise(1, *grid, 32))
    assert len(keys) == 3 * 3 * 3
    assert max(keys) == most[0] * most[1] * most[2]
