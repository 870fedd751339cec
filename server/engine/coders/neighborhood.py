"""Attention over a neighborhood, for the diffusion decoder of LTX-2.5.

diffusers has two implementations. NATTEN's kernels are downloaded code, which this server never runs. FlexAttention
needs a mask of all pairs of tokens, which no device can hold for a video of a usual size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

BLOCK = (4, 8, 8)  # frames, rows and columns of the queries that are computed together


class Span(NamedTuple):
    """Some neighboring queries along one axis and the keys that they attend to, as ranges.

    starts: for each query, the first of its keys, counted from the first key of the span.
    """

    queries: slice
    keys: slice
    starts: tuple[int, ...]


def spans(length: int, kernel: int, block: int) -> Iterator[Span]:
    """Yield the blocks of one axis.

    Each query attends to `kernel` keys. It is in their middle, except near an end of the axis, where the window moves
    inwards and keeps its size.
    """
    for first in range(0, length, block):
        last = min(first + block, length)
        starts = [min(max(query - kernel // 2, 0), length - kernel) for query in range(first, last)]
        relative = tuple(start - starts[0] for start in starts)
        yield Span(slice(first, last), slice(starts[0], starts[-1] + kernel), relative)


class NeighborhoodAttention:
    """A processor for diffusers' `LTX2VideoVaeNeighborhoodAttention` that computes block by block."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: None = None) -> torch.Tensor:
        """Return the attention of tokens `[B, T, H, W, C]`, in the same shape."""
        shape = hidden_states.shape[:4]
        query, key, value = attn.project_qkv(hidden_states)  # [B, T, H, W, heads, d] each, the query scaled
        output = torch.empty_like(query)  # [B, T, H, W, heads, d]
        masks: dict[Any, torch.Tensor] = {}
        axes = [list(spans(*each)) for each in zip(shape[1:], attn.kernel_size, BLOCK, strict=True)]
        for block in product(*axes):
            pattern = tuple((span.starts, span.keys.stop - span.keys.start) for span in block)
            if pattern not in masks:
                masks[pattern] = mask_of(pattern, attn.kernel_size, query.device)
            here = (slice(None), *(span.queries for span in block))
            there = (slice(None), *(span.keys for span in block))
            q, k, v = (each.flatten(1, 3).transpose(1, 2) for each in (query[here], key[there], value[there]))
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[pattern], scale=1.0)  # [B, heads, n, d]
            output[here] = found.transpose(1, 2).reshape(query[here].shape)
        attended: torch.Tensor = attn.to_out[0](output.flatten(4))  # [B, T, H, W, C]
        return attended


def mask_of(pattern: Any, kernel: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return which queries of a block attend to which keys, bool `[queries, keys]`.

    pattern: for each axis, the first key of each query, and the number of keys.
    """
    each = []
    for (starts, keys), size in zip(pattern, kernel, strict=True):
        ahead = torch.arange(keys, device=device) - torch.tensor(starts, device=device)[:, None]  # [queries, keys]
        each.append((ahead >= 0) & (ahead < size))
    t, h, w = each
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return mask.flatten(3).flatten(0, 2)


def use_blocks(vae: Any) -> None:
    """Let the diffusion decoder of LTX-2.5 attend block by block. Other VAEs stay as they are."""
    if type(vae).__name__ == "LTX2VideoDiffusionDecoderModel":
        vae.set_attn_processor(NeighborhoodAttention())
