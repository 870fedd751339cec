"""Run causal modules of diffusers, which expect a whole video at once, on one chunk of frames after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = dict[nn.Module, Any]
"""For each module, the state of the chunks so far that its next chunk needs."""


def convolve(causal: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', n, H, W]
    """Apply a causal convolution to the next chunk.

    Before the first chunk its first frame is repeated; before every other one come the last frames of the previous one.
    """
    *around, before, _ = causal.time_causal_padding
    frames = F.pad(x, (*around, 0, 0), mode="replicate")  # [B, C, n, H + 2, W + 2]
    if not before:
        return causal.conv(frames)  # type: ignore[no-any-return]  # diffusers is untyped
    start = past.get(causal, frames[:, :, :1].expand(-1, -1, before, -1, -1))
    frames = torch.cat([start, frames], 2)  # [B, C, before + n, H + 2, W + 2]
    past[causal] = frames[:, :, -before:].clone()
    return causal.conv(frames)  # type: ignore[no-any-return]  # diffusers is untyped


def convolve_without_cache(causal: Any, past: Past, x: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
    """Apply a causal convolution whose forward also returns diffusers' own cache, which is not used here."""
    return convolve(causal, past, x), None


def upsample(upsampler: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, n, H, W] -> [B, C', T n, 2 H, 2 W]
    """Upsample the next chunk.

    In time, every frame is doubled except the first of the video, which is its own chunk.
    """
    is_first = upsampler not in past
    past[upsampler] = True
    if is_first or not upsampler.add_temporal_upsample:
        return type(upsampler).forward(upsampler, x)  # type: ignore[no-any-return]  # diffusers is untyped
    shortcut = upsampler._dcae_upsample_rearrange(x, r1=2)  # [B, C / 8, 2 n, 2 H, 2 W]
    grown = upsampler._dcae_upsample_rearrange(upsampler.conv(x), r1=2)  # [B, C', 2 n, 2 H, 2 W]
    return grown + shortcut.repeat_interleave(upsampler.repeats, 1)  # type: ignore[no-any-return]  # diffusers is untyped


def attend(block: Any, past: Past, x: Tensor) -> Tensor:  # [B, C, 1, h, w]
    """Apply causal attention to the next frame: its positions attend to this frame and all frames before it.

    Because the frames come one at a time, no mask over pairs of positions is needed.
    """
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
"""The functions above by the class of the module. Classes are named, because older versions of diffusers lack some."""


@contextmanager
def going_on_from(past: Past, *parts: nn.Module) -> Iterator[None]:
    """Inside this context, the causal modules of `parts` continue where the previous chunk ended.

    past: read and updated; empty for the first chunk.
    """
    causal = [module for part in parts for module in part.modules() if type(module).__name__ in FORWARDS]
    for module in causal:
        module.forward = partial(FORWARDS[type(module).__name__], module, past)
    try:
        yield
    finally:
        for module in causal:
            del module.forward
