"""The decoder's last bands, written straight into the layout asked for; no float copy of the whole picture is made."""

from __future__ import annotations

import torch
from torch import Tensor

from server.types import Layout


class Output:
    """`finite` is whether every value written was, a 0-d tensor on the device: rounding to uint8 would hide a NaN."""

    def __init__(self, layout: Layout, shape: tuple[int, int, int, int], like: Tensor) -> None:  # (B, H, W, C)
        """like: of the dtype and on the device of the decode."""
        self.layout = layout
        batch, height, width, channels = shape
        dtype, device = like.dtype, like.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # []
        if layout is Layout.PIXELS:
            self.tensor = torch.empty(shape, dtype=torch.uint8, device=device)  # [B, H, W, C]
        else:
            if layout is Layout.UNIT and dtype is torch.bfloat16:
                dtype = torch.float16  # see Layout
            self.tensor = torch.empty(batch, channels, height, width, dtype=dtype, device=device)  # [B, C, H, W]

    def write(self, image: int, top: int, sample: Tensor) -> None:  # [b, n, W, C]
        self.finite &= torch.isfinite(sample).all()
        images, rows = slice(image, image + sample.shape[0]), slice(top, top + sample.shape[1])
        match self.layout:
            case Layout.SAMPLE:
                self.tensor[images, :, rows] = sample.permute(0, 3, 1, 2)  # [b, C, n, W]
            case Layout.UNIT:
                self.tensor[images, :, rows] = denormalize(sample.float()).permute(0, 3, 1, 2)  # [b, C, n, W]
            case Layout.PIXELS:
                self.tensor[images, rows] = (
                    denormalize(sample.float()).mul_(255).round_().to(torch.uint8)
                )  # [b, n, W, C]


def denormalize(sample: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped: `VaeImageProcessor.denormalize`."""
    return (sample / 2 + 0.5).clamp_(0, 1)
