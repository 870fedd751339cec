"""The passes of the HunyuanVideo decoder over chunks of frames, one for each kind of layer. Nothing is approximate.

A causal 3x3x3 convolution reads a frame and the two frames before it. The first frame is repeated before the video, and
the edges are repeated around each frame. It is computed as a 3x3 convolution of the channels of those three frames side
by side. The kernels of the image decoder can therefore run it, and it accumulates only once, in float32.

GroupNorm needs the statistics of the whole video, so a layer starts when the layer before it is complete. At most two
of the largest activations are stored as a whole. All other memory depends on the size of a chunk or has a fixed limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.moments import Affine, GroupNorm, Moments
from ...kernels.reference import Kernels
from ..image.layers import Attention, Conv, Linear, Resnet
from ..interface import Check

WriteFrames = Callable[[int, Tensor], None]
"""Takes the number of the first frame and finished frames `[n, H, W, C]`, from the first to the last."""


@dataclass(frozen=True)
class Upsample:
    """A nearest-neighbour upsample and its causal convolution, folded into one 2x2 convolution to phases.

    grows_in_time: the frames are doubled too. There are four phases in space and, in time, either two, which read the
        frame and the one before it, or one, which reads three frames.
    """

    conv: Conv
    grows_in_time: bool


Step = Resnet | Attention | Upsample


@dataclass(frozen=True)
class VideoWeights:
    """The weights of the decoder, in the order in which they are used."""

    post_quant: Linear
    conv_in: Conv
    steps: tuple[Step, ...]
    norm_out: GroupNorm
    conv_out: Conv


@dataclass(frozen=True)
class Downsample:
    """A causal convolution of stride 2, over an image whose edges are repeated around it.

    shrinks_in_time: it also skips every second frame.
    """

    conv: Conv
    shrinks_in_time: bool


EncoderStep = Resnet | Attention | Downsample


@dataclass(frozen=True)
class VideoEncoderWeights:
    """The weights of the encoder, in the order in which they are used."""

    conv_in: Conv
    steps: tuple[EncoderStep, ...]
    norm_out: GroupNorm
    conv_out: Conv  # the quant_conv that follows is folded into it


class Chunks:
    """An activation as chunks of frames `[n, H, W, C]`, with the statistics of each frame for the next norm."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.chunks: list[Tensor] = []
        self.moments: list[Moments] = []

    def append(self, chunk: Tensor) -> None:  # [n, H, W, C]
        """Add a chunk after the others, and take its statistics."""
        self.chunks.append(chunk)
        self.note(chunk)

    def note(self, chunk: Tensor) -> None:  # [n, H, W, C]
        """Take the statistics of a chunk, frame by frame, so that they do not depend on its length."""
        for frame in chunk:
            self.moments.append(self.kernels.moments(frame[None], frame.shape[0]))

    def take(self) -> Iterator[Tensor]:
        """Yield the chunks, from the first to the last, and remove each one, so that its memory can be freed."""
        self.chunks.reverse()
        while self.chunks:
            yield self.chunks.pop()


class History:
    """The last frames before the next chunk, which its convolution reads. They make a decode in chunks exact."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.frames: Tensor | None = None  # [length, H, W, C]

    def side_by_side(self, chunk: Tensor, start: int = 0, step: int = 1) -> Tensor:  # [n, H, W, C]
        """Return the channels of frames and of the `length` frames before each, padded by repeating the edges.

        start, step: which frames of the chunk are returned, `[n', H + 2, W + 2, (length + 1) C]`.
        """
        n, height, width, channels = chunk.shape
        before = chunk[:1].expand(self.length, -1, -1, -1) if self.frames is None else self.frames
        frames = torch.cat([before, chunk])  # [length + n, H, W, C]
        self.frames = frames[n:].clone() if n > self.length else frames[n:]
        taken = len(range(start, n, step))
        y = chunk.new_empty(taken, height + 2, width + 2, (self.length + 1) * channels)  # [n', H + 2, W + 2, ...]
        for back in range(self.length + 1):
            y[:, 1:-1, 1:-1, back * channels : (back + 1) * channels] = frames[back + start : back + n : step]
        y[:, 1:-1, 0], y[:, 1:-1, -1] = y[:, 1:-1, 1], y[:, 1:-1, -2]
        y[:, 0], y[:, -1] = y[:, 1], y[:, -2]
        return y


def decode(
    network: VideoWeights,
    kernels: Kernels,
    chunk_bytes: int,
    query_bytes: int,
    latents: Tensor,
    write: WriteFrames,
    check: Check,
) -> None:
    """Decode the latents `[C, F, h, w]` of one video.

    chunk_bytes: the largest size of a chunk of frames.
    query_bytes: the largest size of a chunk of attention scores.
    write: receives the frames of the sample `[n, H, W, 3]`, from the first to the last.
    check: called before each chunk of frames and each chunk of queries.
    """
    x = first(network, kernels, chunk_bytes, latents, check)
    for step in network.steps:
        match step:
            case Resnet():
                x = resnet(step, kernels, x, check)
            case Attention():
                x = attention(step, kernels, query_bytes, x, check)
            case Upsample():
                x = upsample(step, kernels, chunk_bytes, x, check)
    last(network, kernels, x, write, check)


def encode(
    network: VideoEncoderWeights,
    kernels: Kernels,
    chunk_bytes: int,
    query_bytes: int,
    pixels: Tensor,
    write: WriteFrames,
    check: Check,
) -> None:
    """Encode the pixels `[C, F, H, W]` of one video. The other arguments are those of `decode`.

    write: receives the frames of the posterior's parameters `[n, h, w, 2 C]`, from the first to the last.
    """
    x = conv_in(network.conv_in, kernels, chunk_bytes, pixels.permute(1, 2, 3, 0).contiguous(), check)
    for step in network.steps:
        match step:
            case Resnet():
                x = resnet(step, kernels, x, check)
            case Attention():
                x = attention(step, kernels, query_bytes, x, check)
            case Downsample():
                x = downsample(step, kernels, x, check)
    last(network, kernels, x, write, check)


def first(
    network: VideoWeights, kernels: Kernels, chunk_bytes: int, latents: Tensor, check: Check
) -> Chunks:  # [C, F, h, w]
    """Apply the first two convolutions to whole latents."""
    frames = latents.permute(1, 2, 3, 0).contiguous()  # [F, h, w, C]
    frames = F.linear(frames, network.post_quant.weight, network.post_quant.bias)  # [F, h, w, C]
    return conv_in(network.conv_in, kernels, chunk_bytes, frames, check)


def conv_in(weights: Conv, kernels: Kernels, chunk_bytes: int, frames: Tensor, check: Check) -> Chunks:  # [F, H, W, C]
    """Apply the first 3x3x3 convolution, in chunks whose output has at most `chunk_bytes`."""
    output, history = Chunks(kernels), History(2)
    frame_bytes = frames[0, ..., 0].numel() * weights.out_channels * frames.element_size()
    for chunk in torch.split(frames, max(1, chunk_bytes // frame_bytes)):
        check()
        output.append(conv(kernels, weights, history.side_by_side(chunk)))  # [n, H, W, C']
    return output


def conv(kernels: Kernels, weights: Conv, y: Tensor) -> Tensor:  # [n, H + 2, W + 2, k C] -> [n, H, W, C']
    """Convolve frames that `History.side_by_side` has padded."""
    return kernels.conv(y, weights.weight, weights.bias, columns=0)


def normalized(kernels: Kernels, affine: Affine, chunk: Tensor) -> Tensor:  # [n, H, W, C]
    """Return silu(affine(chunk)) as a new tensor."""
    out = torch.empty_like(chunk)
    kernels.normalize(chunk.flatten(0, 1)[None], affine, out.flatten(0, 1)[None], silu=True)
    return out


def resnet(block: Resnet, kernels: Kernels, x: Chunks, check: Check) -> Chunks:
    """Apply a residual block."""
    norm1 = kernels.affine(block.norm1, x.moments)
    hidden, residual, history = Chunks(kernels), Chunks(kernels), History(2)
    for chunk in x.take():  # [n, H, W, C]
        check()
        hidden.append(conv(kernels, block.conv1, history.side_by_side(normalized(kernels, norm1, chunk))))
        if block.shortcut is not None:
            chunk = F.linear(chunk, block.shortcut.weight, block.shortcut.bias)  # [n, H, W, C']
        residual.chunks.append(chunk)
    norm2, history = kernels.affine(block.norm2, hidden.moments), History(2)
    for chunk, kept in zip(hidden.take(), residual.chunks, strict=True):  # [n, H, W, C'] twice
        check()
        kept += conv(kernels, block.conv2, history.side_by_side(normalized(kernels, norm2, chunk)))
        residual.note(kept)
    return residual


def attention(block: Attention, kernels: Kernels, query_bytes: int, x: Chunks, check: Check) -> Chunks:
    """Apply causal attention: the positions of frame t attend to all positions of frames 0 to t.

    Because the frames are computed one by one, no mask over pairs of positions is needed.
    """
    affine = kernels.affine(block.norm, x.moments)
    frames = torch.cat(x.chunks)  # [F, h, w, C]
    tokens = torch.empty_like(frames)  # [F, h, w, C]
    kernels.normalize(frames.flatten(0, 1)[None], affine, tokens.flatten(0, 1)[None], silu=False)
    positions = tokens[0, ..., 0].numel()
    tokens = tokens.flatten(0, 2)[None]  # [1, F N, C]
    key = F.linear(tokens, block.key.weight)  # [1, F N, C]
    value = F.linear(tokens, block.value.weight)  # [1, F N, C]
    residual = frames.flatten(0, 2)[None]  # [1, F N, C]
    for frame in range(len(frames)):
        seen = (frame + 1) * positions
        rows = max(1, query_bytes // (seen * tokens.element_size()))
        for start in range(frame * positions, seen, rows):
            check()
            stop = min(start + rows, seen)
            query = F.linear(tokens[:, start:stop], block.query.weight, block.query.bias)  # [1, t, C]
            residual[:, start:stop] += kernels.attend(query, key[:, :seen], value[:, :seen]).add_(block.bias)
    lengths = [len(chunk) for chunk in x.chunks]
    attended = Chunks(kernels)
    for chunk in torch.split(frames, lengths):
        attended.append(chunk)
    return attended


def upsample(block: Upsample, kernels: Kernels, chunk_bytes: int, x: Chunks, check: Check) -> Chunks:
    """Apply an upsample, in chunks whose output has at most `chunk_bytes`."""
    output, history = Chunks(kernels), History(1 if block.grows_in_time else 2)
    times, is_first = (2 if block.grows_in_time else 1), True
    for chunk in x.take():  # [n, H, W, C]
        grown_bytes = chunk[0, ..., 0].numel() * block.conv.out_channels * chunk.element_size()
        for piece in torch.split(chunk, max(1, chunk_bytes // grown_bytes)):
            check()
            y = history.side_by_side(piece)  # [n, H + 2, W + 2, 2 C or 3 C]
            phases = conv(kernels, block.conv, y)  # [n, H + 1, W + 1, 8 C' or 4 C']
            output.append(interleave(phases, times, is_first))
            is_first = False
    return output


def downsample(block: Downsample, kernels: Kernels, x: Chunks, check: Check) -> Chunks:
    """Halve rows and columns, and frames: frame t of the output is computed from frames 2t - 2, 2t - 1 and 2t."""
    output, history, seen, step = Chunks(kernels), History(2), 0, 2 if block.shrinks_in_time else 1
    for chunk in x.take():  # [n, H, W, C]
        check()
        y = history.side_by_side(chunk, -seen % step, step)  # [n', H + 2, W + 2, 3 C]
        seen += len(chunk)
        if len(y):
            output.append(kernels.conv(y, block.conv.weight, block.conv.bias, columns=0, stride=2))
    return output


def interleave(phases: Tensor, times: int, is_first: bool) -> Tensor:  # [n, H + 1, W + 1, T 2 2 C]
    """Return the upsampled frames `[T n, 2 H, 2 W, C]`, one frame less for the first chunk if T is 2.

    The pixel (2 i + p, 2 j + q) of frame T k + s - (T - 1) is phase (s, p, q) of frame k at (i + p, j + q).

    times: T, the number of phases in time, 1 or 2.
    is_first: the chunk begins with the first frame of the video, which is not doubled: its phase s = 0 is dropped.
    """
    n, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    channels = phases.shape[3] // (4 * times)
    out = phases.new_empty(n, times, height, 2, width, 2, channels)  # [n, T, H, 2, W, 2, C]
    for index, phase in enumerate(torch.split(phases, channels, dim=3)):  # [n, H + 1, W + 1, C]
        (s, p), q = divmod(index // 2, 2), index % 2
        out[:, s, :, p, :, q] = phase[:, p : height + p, q : width + q]
    frames = out.view(n * times, 2 * height, 2 * width, channels)  # [n T, 2 H, 2 W, C]
    return frames[times - 1 :] if is_first else frames


def last(
    network: VideoWeights | VideoEncoderWeights, kernels: Kernels, x: Chunks, write: WriteFrames, check: Check
) -> None:
    """Apply the last norm, SiLU and convolution, and write the result chunk by chunk."""
    affine, history, frame = kernels.affine(network.norm_out, x.moments), History(2), 0
    for chunk in x.take():  # [n, H, W, C]
        check()
        sample = conv(kernels, network.conv_out, history.side_by_side(normalized(kernels, affine, chunk)))
        write(frame, sample)  # [n, H, W, 3]
        frame += len(chunk)
