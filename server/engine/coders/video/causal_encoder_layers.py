"""The layers that only encoders of causal video VAEs have, as plain data. `causal_layers.py` has the others."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..image.layers import Linear
from .causal_layers import Attention, CausalConv, Norm, Resnet, out_channels


@dataclass(frozen=True, eq=False)
class Downsample:
    """Halves rows and columns (`space`), and the frames except the first one of a video.

    space: a 3x3 convolution of stride 2 that sees one row of zeros below the image and one column to its right.
    time: a convolution of stride 2 over three frames, 1x1 in space, as a linear map [C, 3 C] of frames side by side;
        It comes after `space`. None for no such layer.
    averages_frames: pairs of frames are averaged before `space`.
    """

    space: Tensor  # packed [O, I, 3, 3]
    bias: Tensor  # [O]
    out_channels: int
    time: Linear | None = None
    averages_frames: bool = False


class Beside(enum.Enum):
    """What a 3x3 convolution of stride 2 reads beside a frame, which has an even number of rows and columns.

    It reads one row above the frame and one column to its left, either of zeros or copies of the frame's edges, or a
    row of zeros below and a column of zeros to the right.
    """

    EDGES_BEFORE = enum.auto()
    ZEROS_BEFORE = enum.auto()
    ZEROS_AFTER = enum.auto()


@dataclass(frozen=True, eq=False)
class CausalDownsample:
    """A causal 3x3x3 convolution of stride 2 in space, and of stride `times`, which is 1 or 2, in time.

    The frames before a video repeat its first one.
    """

    weight: Tensor  # packed [O, 3 I, 3, 3]: a frame and the two before it side by side, the oldest first
    bias: Tensor  # [O]
    times: int
    out_channels: int
    beside: Beside


@dataclass(frozen=True)
class Fold:
    """Halves rows and columns, frames, or all of them: the pixels of a convolution's output become channels.

    times, side: how many frames, and how many rows and columns, become one: 1 or 2. Channels are ordered frame, row,
    column, output channel of the convolution, or, with `channel_first`, output channel, frame, row, column. Where time
    shrinks, the output of the convolution for the first frame of a video is folded with a copy of itself.

    The input is added as a shortcut: folded in the same order, with neighbouring channels averaged. Where time shrinks,
    the first frame of a video is folded with a copy of itself if `channel_first`, and by itself if not, so that fewer
    channels are averaged.
    """

    conv: CausalConv
    times: int
    out_channels: int
    side: int = 2
    channel_first: bool = False


@dataclass(frozen=True)
class Contract:
    """Makes one frame of `times` frames, and halves rows and columns: a linear map of blocks of pixels.

    The channels of a block are ordered frame, row, column, input channel. The first frame of a video makes a frame with
    copies of itself.
    """

    linear: Linear
    times: int
    out_channels: int


@dataclass(frozen=True)
class FrameAttention:
    """x + out(softmax(q kᵀ / sqrt(D)) v) at each position, over its own frame and earlier ones, in heads of D channels.

    Queries and keys are divided by their lengths, which are at least `eps`.
    """

    norm: Norm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    heads: int
    eps: float


@dataclass(frozen=True)
class Average:
    """A shortcut around a downsampling block: blocks of pixels are folded into channels, which are averaged in groups.

    times, side: how many frames, and how many rows and columns, become one. Channels are ordered input channel, frame,
    row, column. The first frame of a video is averaged with zeros in the place of the frames before it.
    """

    times: int
    side: int
    out_channels: int


Shrinking = Downsample | CausalDownsample | Fold | Contract
EncoderStep = Resnet | Attention | FrameAttention | Shrinking


@dataclass(frozen=True)
class EncoderBlock:
    """Layers that are surrounded by a shortcut, if there is one."""

    steps: tuple[EncoderStep, ...]
    shortcut: Average | None = None

    def apart(self) -> tuple[EncoderBlock, ...]:
        """Return a block for each layer, without the shortcut."""
        return tuple(EncoderBlock((step,)) for step in self.steps)


@dataclass(frozen=True)
class Chunks:
    """The frames of a video that are encoded together.

    length: the frames of a chunk.
    first_takes_rest: frames that fill no chunk are encoded with the first one. If not, the first frame of a video is a
        chunk of its own, and the last chunk may be shorter.
    """

    length: int
    first_takes_rest: bool

    def lengths(self, frames: int) -> list[int]:
        """Return how many frames are encoded together, chunk by chunk."""
        first = min(frames, self.length + frames % self.length) if self.first_takes_rest else 1
        whole, rest = divmod(frames - first, self.length)
        return [first, *[self.length] * whole, *([rest] if rest else [])]


@dataclass(frozen=True)
class CausalEncoder:
    """The weights of an encoder, in the order in which they are used.

    patch: side of the pixel blocks that become the first convolution's channels; 1 if these are the sample's own.
    averages_output: means of neighbouring channels before the last norm are added to the output.
    repeats_last: how often the last channel of the output is repeated after it.
    only_multiples_of: after the first frame, diffusers encodes so many frames at a time and ignores a remainder; None
        if it ignores none.
    chunks: how a video is divided, if norms span a frame or a chunk. Those that span a chunk need the chunks of
        diffusers. None if any number of latent frames may be encoded at a time. No chunk ends within the frames that
        become one latent frame.
    waves: frequencies of sines and cosines, `[K]` in float32. They are computed of each channel of the pixels and come
        after these channels.
    """

    patch: int
    conv_in: CausalConv | Linear
    in_channels: int
    blocks: tuple[EncoderBlock, ...]
    norm_out: Norm
    conv_out: CausalConv | Linear
    averages_output: bool
    quant: Linear | None
    dtype: torch.dtype
    device: torch.device
    only_multiples_of: int | None = None
    chunks: Chunks | None = None
    repeats_last: int = 0
    waves: Tensor | None = None

    @property
    def pixel_channels(self) -> int:
        """The channels of the pixels."""
        return self.in_channels // self.patch**2 // (1 if self.waves is None else 1 + 2 * len(self.waves))

    @property
    def channels(self) -> int:
        """The channels of the posterior's parameters."""
        made = out_channels(self.conv_out) if self.quant is None else len(self.quant.weight)
        return made + self.repeats_last

    @property
    def steps(self) -> tuple[EncoderStep, ...]:
        """The layers of all blocks."""
        return tuple(step for block in self.blocks for step in block.steps)

    def spatial_ratio(self) -> int:
        """Return the pixels per latent along one side."""
        return self.patch * prod(space_shrinkage(step) for step in self.steps)

    def temporal_ratio(self) -> int:
        """Return the frames per latent frame, except for the first one, which stays one frame."""
        return prod(time_shrinkage(step) for step in self.steps)

    def frames(self, frames: int) -> int:
        """Return how many frames of a video of this length are encoded."""
        return frames if self.only_multiples_of is None else frames - (frames - 1) % self.only_multiples_of

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of a video of this length."""
        return 1 + (self.frames(frames) - 1) // self.temporal_ratio()

    def chunk_lengths(self, frames: int) -> list[int]:
        """Return into how many frames a video of this length is divided before the first layer."""
        return [frames] if self.chunks is None else self.chunks.lengths(frames)

    def longest_chunk(self, latent_frames: int, frames: int) -> float:
        """Return the most latent frames that are encoded together in a video of this length.

        frames: those that a layer has of each latent frame but the first one, of which it has only one.
        """
        ratio = self.temporal_ratio()
        first, *others = self.chunk_lengths(ratio * (latent_frames - 1) + 1)
        return max((first - 1) / ratio + 1 / frames, *(length / ratio for length in others), 0)


def space_shrinkage(step: EncoderStep) -> int:
    """Return how many rows become one in a layer."""
    if isinstance(step, Fold):
        return step.side
    return 2 if isinstance(step, Shrinking) else 1


def time_shrinkage(step: EncoderStep) -> int:
    """Return how many frames become one in a layer, after the first frame of a video."""
    match step:
        case Downsample():
            return 1 if step.time is None and not step.averages_frames else 2
        case CausalDownsample() | Fold() | Contract():
            return step.times
        case _:
            return 1
