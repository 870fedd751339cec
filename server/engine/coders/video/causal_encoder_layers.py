"""The layers of a causal video encoder whose norms are per pixel, as plain data. `causal_layers.py` has the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..image.layers import Linear
from .causal_layers import Attention, CausalConv, PixelNorm, Resnet


@dataclass(frozen=True)
class Downsample:
    """Halves rows and columns (`space`), then the frames except the first one of a video (`time`).

    space: a 3x3 convolution of stride 2 that sees one row of zeros below the image and one column to its right.
    time: a convolution of stride 2 over three frames, 1x1 in space, as a linear map [C, 3 C] of frames side by side;
        None where the frames stay.
    """

    space: Tensor  # packed [C, C, 3, 3]
    bias: Tensor  # [C]
    out_channels: int
    time: Linear | None


@dataclass(frozen=True)
class Fold:
    """Halves rows, columns and, if `times` is 2, frames: the pixels of a convolution's output become channels.

    Channels are ordered frame s, row p, column q, output channel of the convolution. The first frame of a video stays
    single where time shrinks: its channels (p, q, o) are repeated once. The input is added as a shortcut: folded in the
    same way, with neighbouring channels averaged.
    """

    conv: CausalConv
    times: int
    out_channels: int


@dataclass(frozen=True)
class Average:
    """A shortcut around a downsampling block: blocks of pixels are folded into channels, which are averaged in groups.

    times, side: how many frames, and how many rows and columns, become one. Channels are ordered input channel, frame,
    row, column. The first frame of a video is averaged with zeros in the place of the frames before it.
    """

    times: int
    side: int
    out_channels: int


EncoderStep = Resnet | Attention | Downsample | Fold


@dataclass(frozen=True)
class EncoderBlock:
    """Layers that are surrounded by a shortcut, if there is one."""

    steps: tuple[EncoderStep, ...]
    shortcut: Average | None = None

    def halves(self) -> int:
        """Return how often the block halves rows and columns."""
        return sum(isinstance(step, Downsample | Fold) for step in self.steps)


@dataclass(frozen=True)
class CausalEncoder:
    """The weights of an encoder, in the order in which they are used.

    patch: side of the pixel blocks that become the first convolution's channels; 1 if these are the sample's own.
    chunk_frames: how many frames are encoded together, after the first one. A last chunk that is not full is dropped.
    averages_output: means of neighbouring channels before the last norm are added to the output.
    """

    patch: int
    conv_in: CausalConv
    in_channels: int
    blocks: tuple[EncoderBlock, ...]
    norm_out: PixelNorm
    conv_out: CausalConv
    averages_output: bool
    quant: Linear | None
    chunk_frames: int
    dtype: torch.dtype
    device: torch.device

    @property
    def front(self) -> tuple[EncoderBlock, ...]:
        """The blocks before the first attention, which look no further than a few rows."""
        return self.blocks[: self._front_length]

    @property
    def back(self) -> tuple[EncoderBlock, ...]:
        """The blocks that must see whole frames: from the first attention on."""
        return self.blocks[self._front_length :]

    @property
    def _front_length(self) -> int:
        attends = (any(isinstance(step, Attention) for step in block.steps) for block in self.blocks)
        return next((index for index, found in enumerate(attends) if found), len(self.blocks))

    @property
    def channels(self) -> int:
        """The channels of the posterior's parameters."""
        return self.conv_out.out_channels if self.quant is None else len(self.quant.weight)

    @property
    def sees_past(self) -> bool:
        """Whether an attention keeps keys and values of all frames."""
        steps = (step for block in self.blocks for step in block.steps)
        return any(isinstance(step, Attention) and step.sees_past for step in steps)

    def front_ratio(self) -> int:
        """Return the pixels per pixel of the front's output along one side."""
        return self.patch * int(2 ** sum(block.halves() for block in self.front))

    def spatial_ratio(self) -> int:
        """Return the pixels per latent along one side."""
        return self.front_ratio() * int(2 ** sum(block.halves() for block in self.back))

    def temporal_ratio(self) -> int:
        """Return the frames per latent frame, except for the first one, which stays one frame."""
        return math.prod(times_of(step) for block in self.blocks for step in block.steps)


def times_of(step: EncoderStep) -> int:
    """Return how many frames become one in a step."""
    match step:
        case Downsample():
            return 1 if step.time is None else 2
        case Fold():
            return step.times
        case _:
            return 1
