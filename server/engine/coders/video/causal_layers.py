"""The layers of a causal video VAE whose norms are per pixel, as plain data.

A causal convolution computes frame t from frames t - 2, t - 1 and t. Frames before the video are zero, or copies of the
first frame. A norm that only looks at one pixel needs no statistics of the whole video, so that a video can be decoded
one chunk of frames after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..image.layers import Linear


@dataclass(frozen=True)
class PixelNorm:
    """x / ||x|| * weight over the channels of each pixel, in float32. `weight` contains the factor sqrt(C)."""

    weight: Tensor  # [C], float32
    bias: Tensor | None = None  # [C], float32


@dataclass(frozen=True)
class CausalConv:
    """A 3x3x3 convolution over a frame and the two before it.

    weight: packed by `CausalKernels.pack`. first: the packed 3x3 weight for the first frame of a video, which sees only
    itself: the last tap where frames before the video are zero, the sum of all taps where they repeat the first frame.
    """

    weight: Tensor
    first: Tensor
    bias: Tensor  # [O]
    out_channels: int
    replicates: bool = False  # whether rows, columns and frames around the video repeat its edges; they are zero if not


@dataclass(frozen=True)
class Resnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with x through `shortcut` where the channels change."""

    norm1: PixelNorm
    conv1: CausalConv
    norm2: PixelNorm
    conv2: CausalConv
    shortcut: Linear | None


@dataclass(frozen=True)
class Attention:
    """x + softmax(q kᵀ / sqrt(C)) v. The output projection is folded into v.

    sees_past: a position attends to all positions of its own frame and of earlier ones; if not, only to its own frame.
    """

    norm: PixelNorm
    query: Linear
    key: Linear
    value: Linear
    bias: Tensor  # [C]
    sees_past: bool = False


@dataclass(frozen=True)
class Duplicate:
    """A shortcut around an upsampling block: every channel is repeated, and then unfolded in time and space.

    Channel c of the input, repeated `repeats` times, fills the channels (o, s, p, q) of the output in order:
    output channel o, frame s of `times`, row p of 2, column q of 2.
    """

    repeats: int
    times: int
    out_channels: int


@dataclass(frozen=True)
class Upsample:
    """Doubles the frames except the first one (`time`), then doubles rows and columns (`space`).

    time: the convolution over three frames, 1x1 in space, as a linear map [2 C, 3 C] of frames side by side; None where
        the frames stay.
    space: nearest upsampling and the 3x3 convolution after it, folded into one 2x2 convolution to four phases.
    """

    time: Linear | None
    space: Tensor  # packed [4 O, I, 2, 2]
    bias: Tensor  # [O]
    out_channels: int


@dataclass(frozen=True)
class Unfold:
    """Doubles rows, columns and, if `times` is 2, frames: a convolution whose channels (s, p, q, o) are unfolded.

    Channels are ordered frame s, row p, column q, output channel o. The first frame of a video stays single where time
    grows: its channels are ordered (p, q, o), of which the first half of o is used. The input is added as a shortcut:
    unfolded in the same way, with its channels repeated.
    """

    conv: CausalConv
    times: int
    out_channels: int


Step = Resnet | Attention | Upsample | Unfold


@dataclass(frozen=True)
class Block:
    """Layers that are surrounded by a shortcut, if there is one."""

    steps: tuple[Step, ...]
    shortcut: Duplicate | None = None


@dataclass(frozen=True)
class CausalDecoder:
    """The weights of a decoder, in the order in which they are used.

    patch: side of the pixel blocks that the last convolution's channels contain; 1 if they are the sample's own.
    clamps: the sample is clamped to [-1, 1].
    """

    post_quant: Linear | None
    conv_in: CausalConv
    blocks: tuple[Block, ...]
    norm_out: PixelNorm
    conv_out: CausalConv
    patch: int
    clamps: bool
    repeats_input: int  # how often each latent channel is repeated to be added to conv_in's output; 0 for never
    dtype: torch.dtype
    device: torch.device

    @property
    def head_channels(self) -> int:
        """The channels after the head. Its layers do not change those of the first convolution."""
        return self.conv_in.out_channels

    @property
    def head(self) -> tuple[Block, ...]:
        """The blocks that must see whole frames: up to the last attention."""
        return self.blocks[: self._head_length]

    @property
    def tail(self) -> tuple[Block, ...]:
        """The blocks after the last attention, which look no further than a few rows."""
        return self.blocks[self._head_length :]

    @property
    def _head_length(self) -> int:
        attends = [any(isinstance(step, Attention) for step in block.steps) for block in self.blocks]
        return max((index + 1 for index, found in enumerate(attends) if found), default=0)

    def spatial_ratio(self) -> int:
        """Return the pixels per latent along one side."""
        grows = (isinstance(step, Upsample | Unfold) for block in self.blocks for step in block.steps)
        return self.patch * int(2 ** sum(grows))

    def temporal_ratio(self) -> int:
        """Return the frames per latent frame, except for the first one, which becomes one frame."""
        steps = [step for block in self.blocks for step in block.steps]
        doubled = sum(isinstance(step, Upsample) and step.time is not None for step in steps)
        return int(2 ** (doubled + sum(isinstance(step, Unfold) and step.times == 2 for step in steps)))
