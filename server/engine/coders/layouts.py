"""The layouts of a decoder's output: denormalize and quantise on the device, so that only the answer leaves it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...values import Layout
from ..tensors import DTYPES

LARGEST_HALF = torch.finfo(torch.float16).max


def denormalize(sample: Tensor) -> Tensor:
    """Map a sample from [-1, 1] to [0, 1] in float32 and clamp it, as `VaeImageProcessor.denormalize` does."""
    return (sample.float() / 2 + 0.5).clamp_(0, 1)


def quantize(unit: Tensor) -> Tensor:
    """Round float32 values in [0, 1] to uint8, in place: `round(255 x)`."""
    return unit.mul_(255).round_().to(torch.uint8)


def postprocess(sample: Tensor, layout: Layout) -> Tensor:
    """Return a whole sample `[B, C, H, W]` or `[B, C, F, H, W]` in the given layout."""
    if layout is Layout.SAMPLE:
        return sample
    unit = denormalize(sample)
    if sample.ndim == 5:
        unit = unit.transpose(1, 2).flatten(0, 1)  # [B, C, F, H, W] -> [B F, C, H, W]
    if layout is Layout.UNIT:
        return unit if sample.dtype == torch.float32 else unit.half()
    return quantize(unit).movedim(1, -1)  # [N, C, H, W] -> [N, H, W, C]


class Output:
    """A decoder's output, written band by band or frame by frame in its layout, without a float copy of the whole.

    tensor: the output, in the layout.
    finite: whether every value written was finite, a 0-d tensor on the device. Rounding to uint8 would hide a NaN.
    """

    def __init__(self, layout: Layout, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """shape: (N, H, W, C), where N counts images or frames. like: a tensor with the decoder's dtype and device."""
        self.layout = layout
        count, height, width, channels = shape
        dtype, device = like.dtype, like.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # []
        if layout is Layout.PIXELS:
            self.tensor = torch.empty(shape, dtype=torch.uint8, device=device)  # [N, H, W, C]
        else:
            if layout is Layout.UNIT and dtype is torch.bfloat16:
                dtype = torch.float16  # as `Layout` says
            self.tensor = torch.empty(count, channels, height, width, dtype=dtype, device=device)  # [N, C, H, W]

    def write(self, first: int, top: int, sample: Tensor) -> None:  # [n, rows, W, C]
        """Write rows of the images or frames from `first` on. top: their first row."""
        self.finite &= torch.isfinite(sample).all()
        images, rows = slice(first, first + sample.shape[0]), slice(top, top + sample.shape[1])
        match self.layout:
            case Layout.SAMPLE:
                self.tensor[images, :, rows] = sample.permute(0, 3, 1, 2)  # [n, C, rows, W]
            case Layout.UNIT:
                self.tensor[images, :, rows] = denormalize(sample).permute(0, 3, 1, 2)  # [n, C, rows, W]
            case Layout.PIXELS:
                self.tensor[images, rows] = quantize(denormalize(sample))  # [n, rows, W, C]


def in_dtype(values: Tensor, name: str | None) -> Tensor:
    """Return floats in the dtype of an answer: `name`, or float16 for bfloat16, which NumPy does not have.

    float16 represents every bfloat16 of magnitude 2^-14 to 65504 exactly. Larger values become 65504, not infinity; a
    sample is about [-1, 1]. Values of other dtypes, such as uint8 pixels, are returned unchanged.
    """
    if not values.is_floating_point():
        return values
    dtype = DTYPES[name] if name else torch.float16 if values.dtype == torch.bfloat16 else values.dtype
    if dtype == torch.float16 and values.dtype != torch.float16:
        values = values.clamp(-LARGEST_HALF, LARGEST_HALF)
    return values.to(dtype)
