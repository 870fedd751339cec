"""The layers of causal video VAEs, as plain data.

A causal convolution computes frame t from frames t - 2, t - 1 and t. Frames before the video are zero, or copies of the
first frame. A norm looks at one pixel, or at the statistics of a frame, of a chunk of frames or of the whole video.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...kernels.moments import GroupNorm
from ..image.layers import Linear


@dataclass(frozen=True)
class PixelNorm:
    """x / ||x|| * weight over the channels of each pixel, in float32. `weight` contains the factor sqrt(C)."""

    weight: Tensor  # [C], float32


@dataclass(frozen=True)
class PixelRms:
    """x / sqrt(mean(x²) + eps) over the channels of each pixel, then scale * x + shift, in float32."""

    eps: float
    scale: Tensor | None = None  # [C], float32
    shift: Tensor | None = None  # [C], float32


class Span(enum.Enum):
    """The frames that share the statistics of a GroupNorm. CHUNK: those that diffusers computes together."""

    FRAME = enum.auto()
    CHUNK = enum.auto()
    VIDEO = enum.auto()


@dataclass(frozen=True, eq=False)
class SpanNorm:
    """A GroupNorm whose statistics are those of all frames of a span.

    scale, shift: linear maps of the latents `[Z]` to channels `[C]`. The norm's output is multiplied by the first and
    then added to the second, each enlarged to the size of the activation by repeating its values. None for neither.
    """

    norm: GroupNorm
    span: Span
    scale: Linear | None = None
    shift: Linear | None = None


Norm = PixelNorm | PixelRms | SpanNorm


class Before(enum.Enum):
    """What a causal convolution reads in place of the frames before a video."""

    ZEROS = enum.auto()
    FIRST_FRAME = enum.auto()


@dataclass(frozen=True, eq=False)
class CausalConv:
    """A 3x3x3 convolution over a frame and the two before it.

    weight: packed by `CausalKernels.pack`. first: the packed 3x3 weight for the first frame of a video, which sees only
    itself: the last tap where frames before the video are zero, the sum of all taps where they repeat the first frame.
    That sum comes as `first_terms` weights side by side, which are added.
    before: the frames before the video. replicates: rows and columns around each frame repeat its edges; they are zero
    if not.
    """

    weight: Tensor
    first: Tensor
    bias: Tensor  # [O]
    out_channels: int
    before: Before = Before.ZEROS
    replicates: bool = False
    first_terms: int = 1


@dataclass(frozen=True)
class NormedLinear:
    """A layer norm over the channels of each pixel, and a 1x1 convolution."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float
    linear: Linear


@dataclass(frozen=True)
class Resnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with x through `shortcut` where the channels change."""

    norm1: Norm
    conv1: CausalConv
    norm2: Norm
    conv2: CausalConv
    shortcut: Linear | NormedLinear | None


@dataclass(frozen=True)
class Attention:
    """x + softmax(q kᵀ / sqrt(C)) v + bias. The output projection is folded into `value` and `bias`.

    sees_past: a position attends to all positions of its own frame and of earlier ones; if not, only to its own frame.
    """

    norm: Norm
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
    repeats: at the end every frame is repeated, except the first one of a video with an odd number of latent frames.
    """

    time: Linear | None
    space: Tensor  # packed [4 O, I, 2, 2]
    bias: Tensor  # [O]
    out_channels: int
    repeats: bool = False


class Doubling(enum.Enum):
    """How the frames of a chunk are doubled.

    NEAREST: each frame is repeated. LINEAR: frame t becomes frames at t - 1/4 and t + 1/4, interpolated linearly, as
    `F.interpolate` does.
    """

    NEAREST = enum.auto()
    LINEAR = enum.auto()


@dataclass(frozen=True, eq=False)
class CausalUpsample:
    """Nearest upsampling of rows, columns and maybe frames, and the causal 3x3x3 convolution after it.

    Both are folded into one convolution to phases.

    times: T, 1 or 2: the frames made of each frame but the first of a video.
    taps: k, 2 or 3: the frames that each output frame reads.

    weight: packed [T 4 O, k I, 2, 2]; its inputs are a frame and the k - 1 before it, side by side, and its outputs the
        phases (frame s of T, row p of 2, column q of 2). T is 2 where the upsampling doubles the frames, too, except
        the first one of a video.
    first: packed [4 O, n I, 2, 2]: n = `first_terms` weights side by side, whose sum is the weight for a video's first
        frame.
    after: how the frames of all chunks but the first are doubled afterwards; None if they stay.
    """

    weight: Tensor
    first: Tensor
    bias: Tensor  # [T 4 O]
    taps: int
    times: int
    out_channels: int
    replicates: bool  # as for `CausalConv`
    after: Doubling | None = None
    first_terms: int = 1


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


@dataclass(frozen=True)
class Expand:
    """Makes `times` frames of each frame, the first one included, and doubles rows and columns.

    It is a linear map of each pixel to channels (s, p, q, o), which are unfolded.
    """

    linear: Linear
    times: int
    out_channels: int


Step = Resnet | Attention | Upsample | CausalUpsample | Unfold | Expand


@dataclass(frozen=True)
class Block:
    """Layers that are surrounded by a shortcut, if there is one."""

    steps: tuple[Step, ...]
    shortcut: Duplicate | None = None

    def apart(self) -> tuple[Block, ...]:
        """Return a block for each layer, without the shortcut."""
        return tuple(Block((step,)) for step in self.steps)


@dataclass(frozen=True)
class CausalDecoder:
    """The weights of a decoder, in the order in which they are used.

    norm_out: None if only SiLU comes before the last layer, which is a `Linear` then.
    patch: side of the pixel blocks that the last layer's channels contain; 1 if they are the sample's own.
    clamps: the sample is clamped to [-1, 1].
    repeats_input: how often each latent channel is repeated to be added to conv_in's output; 0 for never.
    chunk: latent frames that are decoded together. The remainder is decoded with the first chunk.
    dropped: frames at the start of the sample that are not part of the video.
    """

    post_quant: Linear | None
    conv_in: CausalConv | Linear
    blocks: tuple[Block, ...]
    norm_out: Norm | None
    conv_out: CausalConv | Linear
    dtype: torch.dtype
    device: torch.device
    patch: int = 1
    clamps: bool = False
    repeats_input: int = 0
    chunk: int = 1
    dropped: int = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """The layers of all blocks."""
        return tuple(step for block in self.blocks for step in block.steps)

    @property
    def channels(self) -> int:
        """The channels of the sample."""
        return out_channels(self.conv_out) // self.patch**2

    def spatial_ratio(self) -> int:
        """Return the pixels per latent along one side."""
        return self.patch * prod(space_growth(step) for step in self.steps)

    def temporal_ratio(self) -> int:
        """Return the frames per latent frame. The first one becomes a single frame if `starts_single` says so."""
        return prod(time_growth(step) for step in self.steps)

    def chunk_lengths(self, latent_frames: int) -> list[int]:
        """Return how many latent frames are decoded together, chunk by chunk."""
        first = min(latent_frames, self.chunk + latent_frames % self.chunk)
        return [first, *[self.chunk] * ((latent_frames - first) // self.chunk)]

    def starts_single(self, latent_frames: int) -> bool:
        """Return whether the first latent frame of a video of this length becomes a single frame."""
        if any(isinstance(step, Expand) for step in self.steps):
            return False
        return self.chunk == 1 or latent_frames % 2 == 1

    def frames(self, latent_frames: int) -> int:
        """Return the frames of a video of this length."""
        ratio = self.temporal_ratio()
        first = 1 if self.starts_single(latent_frames) else ratio
        return first + (latent_frames - 1) * ratio - self.dropped


def out_channels(layer: CausalConv | Linear) -> int:
    """Return how many channels the first or last layer of a decoder makes."""
    return layer.out_channels if isinstance(layer, CausalConv) else len(layer.weight)


def space_growth(step: Step) -> int:
    """Return how many rows a layer computes from one."""
    return 1 if isinstance(step, Resnet | Attention) else 2


def time_growth(step: Step) -> int:
    """Return how many frames a layer computes from one that is not the first of a video."""
    match step:
        case Upsample():
            return 2 if step.time is not None or step.repeats else 1
        case CausalUpsample():
            return step.times * (1 if step.after is None else 2)
        case Unfold() | Expand():
            return step.times
        case _:
            return 1
