"""The values that cross a border between layers. Plain Python: no torch, no HTTP."""

from __future__ import annotations

from enum import StrEnum


class Layout(StrEnum):
    """What a decode leaves on the device, before it is rendered to bytes.

    SAMPLE: what `vae.decode` returns, about [-1, 1], in the model's dtype, `[B, C, H, W]` or `[B, C, F, H, W]`.
    UNIT: denormalized to [0, 1] and clamped, same axes, model's dtype.
    PIXELS: `round(255 x)` of UNIT computed in float32, uint8, channels last: `[B, H, W, C]` or `[B, F, H, W, C]`.
    """

    SAMPLE = "sample"
    UNIT = "unit"
    PIXELS = "pixels"
