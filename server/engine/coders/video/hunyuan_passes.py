"""The HunyuanVideo decoder, layer by layer, each layer a pass over chunks of frames. Nothing here is approximate.

A causal 3x3x3 convolution sees a frame and the two before it, the first frame repeated before the clip and the edges
repeated around it. It is computed as a 3x3 convolution of those frames' channels side by side, so that the picture
decoder's kernels run it, with one float32 accumulation. GroupNorm is over the whole clip, so a layer starts when the
one before is complete: the clip's activations are whole, two at most; everything else grows with the chunk.
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

Emit = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Upsample:
    """Nearest upsampling and the causal convolution after it as one 2x2 convolution to phases.

    Four phases in space; in time two, which see the frame and the one before it, or one, which sees three frames.
    """

    conv: Conv
    grows_in_time: bool


Step = Resnet | Attention | Upsample


@dataclass(frozen=True)
class VideoWeights:
    post_quant: Linear
    conv_in: Conv
    steps: tuple[Step, ...]
    norm_out: GroupNorm
    conv_out: Conv


class Chunks:
    """Chunks of frames `[n, H, W, C]`, first to last, and the moments of every frame for the norm that reads them."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.chunks: list[Tensor] = []
        self.moments: list[Moments] = []

    def append(self, chunk: Tensor) -> None:  # [n, H, W, C]
        self.chunks.append(chunk)
        self.note(chunk)

    def note(self, chunk: Tensor) -> None:  # [n, H, W, C]
        for frame in chunk:  # by frame, so that the chunk's length changes nothing
            self.moments.append(self.kernels.moments(frame[None], frame.shape[0]))

    def take(self) -> Iterator[Tensor]:
        """The chunks, each forgotten here as it is given out."""
        self.chunks.reverse()
        while self.chunks:
            yield self.chunks.pop()


class History:
    """The frames that the next chunk's convolution looks back to: what makes chunks exact."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.frames: Tensor | None = None  # [length, H, W, C]

    def side_by_side(self, chunk: Tensor) -> Tensor:  # [n, H, W, C] -> [n, H + 2, W + 2, (length + 1) C]
        n, height, width, channels = chunk.shape
        before = chunk[:1].expand(self.length, -1, -1, -1) if self.frames is None else self.frames
        frames = torch.cat([before, chunk])  # [length + n, H, W, C]
        self.frames = frames[n:].clone() if n > self.length else frames[n:]
        y = chunk.new_empty(n, height + 2, width + 2, (self.length + 1) * channels)  # [n, H + 2, W + 2, ...]
        for back in range(self.length + 1):
            y[:, 1:-1, 1:-1, back * channels : (back + 1) * channels] = frames[back : back + n]
        y[:, 1:-1, 0], y[:, 1:-1, -1] = y[:, 1:-1, 1], y[:, 1:-1, -2]
        y[:, 0], y[:, -1] = y[:, 1], y[:, -2]
        return y


def decode(
    network: VideoWeights,
    kernels: Kernels,
    chunk_bytes: int,
    query_bytes: int,
    latents: Tensor,
    emit: Emit,
    check: Check,
) -> None:
    """Decode latents [C, F, h, w]; `emit(first frame, sample [n, H, W, 3])` receives the video from first to last.

    check: called before each chunk of frames and each chunk of queries.
    """
    clip = first(network, kernels, chunk_bytes, latents, check)
    for step in network.steps:
        match step:
            case Resnet():
                clip = resnet(step, kernels, clip, check)
            case Attention():
                clip = attention(step, kernels, query_bytes, clip, check)
            case Upsample():
                clip = upsample(step, kernels, chunk_bytes, clip, check)
    last(network, kernels, clip, emit, check)


def first(
    network: VideoWeights, kernels: Kernels, chunk_bytes: int, latents: Tensor, check: Check
) -> Chunks:  # [C, F, h, w]
    frames = latents.permute(1, 2, 3, 0).contiguous()  # [F, h, w, C]
    frames = F.linear(frames, network.post_quant.weight, network.post_quant.bias)  # [F, h, w, C]
    clip, history = Chunks(kernels), History(2)
    frame_bytes = frames[0, ..., 0].numel() * network.conv_in.out_channels * frames.element_size()
    for chunk in torch.split(frames, max(1, chunk_bytes // frame_bytes)):
        check()
        clip.append(conv(kernels, network.conv_in, history.side_by_side(chunk)))  # [n, h, w, C']
    return clip


def conv(kernels: Kernels, weights: Conv, y: Tensor) -> Tensor:  # [n, H + 2, W + 2, k C] -> [n, H, W, C']
    return kernels.conv(y, weights.weight, weights.bias, columns=0)


def normalized(kernels: Kernels, affine: Affine, chunk: Tensor) -> Tensor:  # [n, H, W, C]
    """silu(scale x + shift), out of place."""
    out = torch.empty_like(chunk)
    kernels.normalize(chunk.flatten(0, 1)[None], affine, out.flatten(0, 1)[None], silu=True)
    return out


def resnet(block: Resnet, kernels: Kernels, x: Chunks, check: Check) -> Chunks:
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
    """Frame t attends to all positions of frames 0 to t: causal by frame, so no mask over pairs of positions."""
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
    larger, history = Chunks(kernels), History(1 if block.grows_in_time else 2)
    times, is_first = (2 if block.grows_in_time else 1), True
    for chunk in x.take():  # [n, H, W, C]
        grown_bytes = chunk[0, ..., 0].numel() * block.conv.out_channels * chunk.element_size()
        for part in torch.split(chunk, max(1, chunk_bytes // grown_bytes)):
            check()
            y = history.side_by_side(part)  # [n, H + 2, W + 2, 2 C or 3 C]
            phases = conv(kernels, block.conv, y)  # [n, H + 1, W + 1, 8 C' or 4 C']
            larger.append(interleave(phases, times, is_first))
            is_first = False
    return larger


def interleave(phases: Tensor, times: int, is_first: bool) -> Tensor:  # [n, H + 1, W + 1, T 2 2 C]
    """Frame T k + s - (T - 1), pixel (2 i + p, 2 j + q) is phase (s, p, q) of frame k at (i + p, j + q).

    The clip's first frame is not doubled: where time grows, its first phase would lie before the clip.
    """
    n, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    channels = phases.shape[3] // (4 * times)
    out = phases.new_empty(n, times, height, 2, width, 2, channels)  # [n, T, H, 2, W, 2, C]
    for index, part in enumerate(torch.split(phases, channels, dim=3)):  # [n, H + 1, W + 1, C]
        (s, p), q = divmod(index // 2, 2), index % 2
        out[:, s, :, p, :, q] = part[:, p : height + p, q : width + q]
    frames = out.view(n * times, 2 * height, 2 * width, channels)  # [n T, 2 H, 2 W, C]
    return frames[times - 1 :] if is_first else frames


def last(network: VideoWeights, kernels: Kernels, x: Chunks, emit: Emit, check: Check) -> None:
    affine, history, frame = kernels.affine(network.norm_out, x.moments), History(2), 0
    for chunk in x.take():  # [n, H, W, C]
        check()
        sample = conv(kernels, network.conv_out, history.side_by_side(normalized(kernels, affine, chunk)))
        emit(frame, sample)  # [n, H, W, 3]
        frame += len(chunk)
