"""A decoded sample to the layout asked for, on the device, so that only the bytes of the answer leave it."""

from __future__ import annotations

import torch

from server.engine.tensors import DTYPES
from server.types import Layout

LARGEST_HALF = torch.finfo(torch.float16).max


def postprocess(sample: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Match `VaeImageProcessor.postprocess`: `(sample / 2 + 0.5).clamp(0, 1)`, then `round(255 x)`, in float32.

    sample: [B, C, H, W] or [B, C, F, H, W] -> as `Layout` says
    """
    if layout is Layout.SAMPLE:
        return sample
    unit = (sample.float() / 2 + 0.5).clamp(0, 1)
    if sample.ndim == 5:
        unit = unit.transpose(1, 2).flatten(0, 1)  # [B, C, F, H, W] -> [B F, C, H, W]
    if layout is Layout.UNIT:
        return unit if sample.dtype == torch.float32 else unit.half()
    return unit.mul_(255).round_().to(torch.uint8).movedim(1, -1)  # [N, C, H, W] -> [N, H, W, C]


def in_dtype(values: torch.Tensor, name: str | None) -> torch.Tensor:
    """Return floats in the dtype of an answer: `name`, else float16 for bfloat16, which NumPy does not have.

    float16 holds every bfloat16 of magnitude 2^-14 to 65504 exactly. Larger values become 65504, not infinity; a
    sample is about [-1, 1]. Other dtypes, uint8 pixels among them, are left as they are.
    """
    if not values.is_floating_point():
        return values
    dtype = DTYPES[name] if name else torch.float16 if values.dtype == torch.bfloat16 else values.dtype
    if dtype == torch.float16 and values.dtype != torch.float16:
        values = values.clamp(-LARGEST_HALF, LARGEST_HALF)
    return values.to(dtype)
