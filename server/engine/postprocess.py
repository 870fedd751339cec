"""A decoded sample to the layout asked for, on the device, so that only the bytes of the answer leave it."""

from __future__ import annotations

import torch

from server.types import Layout


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
