"""Causal modules of diffusers that take a clip at once, made to take it chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = dict[nn.Module, Any]
"""What each module's next chunk looks back to."""


def convolve(causal: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', n, H, W]
    """Frames before the clip are copies of its first, those before a chunk are those of the chunk before."""
    *around, before, _ = causal.time_causal_padding
    frames = F.pad(x, (*around, 0, 0), mode="replicate")  # [B, C, n, H + 2, W + 2]
    if not before:
        return causal.conv(frames)  # type: ignore[no-any-return]  # diffusers is untyped
    start = past.get(causal, frames[:, :, :1].expand(-1, -1, before, -1, -1))
    frames = torch.cat([start, frames], 2)  # [B, C, before + n, H + 2, W + 2]
    past[causal] = frames[:, :, -before:].clone()
    return causal.conv(frames)  # type: ignore[no-any-return]  # diffusers is untyped


def convolve_without_cache(causal: Any, past: Past, x: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
    return convolve(causal, past, x), None


def upsample(upsampler: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', T n, 2 H, 2 W]
    """The clip's first frame, a chunk by itself, is not doubled; every other is."""
    is_first = upsampler not in past
    past[upsampler] = True
    if is_first or not upsampler.add_temporal_upsample:
        return type(upsampler).forward(upsampler, x)  # type: ignore[no-any-return]  # diffusers is untyped
    shortcut = upsampler._dcae_upsample_rearrange(x, r1=2)  # [B, C / 8, 2 n, 2 H, 2 W]
    grown = upsampler._dcae_upsample_rearrange(upsampler.conv(x), r1=2)  # [B, C', 2 n, 2 H, 2 W]
    return grown + shortcut.repeat_interleave(upsampler.repeats, 1)  # type: ignore[no-any-return]  # diffusers is untyped


def attend(block: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, 1, h, w]
    """A position sees its own frame and all before it: one frame at a time needs no mask over pairs of positions."""
    normed = block.norm(x)
    query, key, value = (
        project(normed).flatten(2).mT[:, None].contiguous() for project in (block.to_q, block.to_k, block.to_v)
    )  # [B, 1, h w, C]
    keys, values = past.get(block, (key[:, :, :0], value[:, :, :0]))
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)  # [B, 1, frames h w, C]
    past[block] = key, value
    seen = F.scaled_dot_product_attention(query, key, value)[:, 0].mT.reshape(x.shape)  # [B, C, 1, h, w]
    return block.proj_out(seen) + x  # type: ignore[no-any-return]  # diffusers is untyped


FORWARDS: dict[str, Callable[..., Any]] = {
    "HunyuanVideo15CausalConv3d": convolve,
    "CogVideoXCausalConv3d": convolve_without_cache,
    "HunyuanVideo15Upsample": upsample,
    "HunyuanVideo15AttnBlock": attend,
}
"""By name, for not every diffusers has all of them."""


@contextmanager
def going_on_from(past: Past, *parts: nn.Module) -> Iterator[None]:
    """Within it the causal modules of `parts` go on where the chunk before ended, and leave there what comes after."""
    causal = [module for part in parts for module in part.modules() if type(module).__name__ in FORWARDS]
    for module in causal:
        module.forward = partial(FORWARDS[type(module).__name__], module, past)
    try:
        yield
    finally:
        for module in causal:
            del module.forward
