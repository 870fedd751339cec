"""How much memory a causal encode needs, for each height of the slabs of rows in which its front is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...kernels.causal_kernels import TAPS
from .causal_encoder_layers import CausalEncoder, Downsample, EncoderBlock, EncoderStep, Fold
from .causal_layers import Attention, Resnet


def halo_rows(encoder: CausalEncoder) -> int:
    """Return how many rows of the front's output above and below a slab must be computed with it.

    At its own edge a slab is padded as if the image ended there. These rows keep the wrong values out of the slab.
    """
    rows = 0
    for block in reversed(encoder.front):
        for step in reversed(block.steps):
            match step:
                case Resnet():
                    rows += 2
                case Downsample() | Fold():
                    rows = 2 * rows + 1  # a 3x3 convolution, beside the halving
                case Attention():
                    raise AssertionError("the front has no attention")
    rows = encoder.patch * (rows + 1)  # of the first convolution
    return -(-rows // encoder.front_ratio())


@dataclass
class Account:
    """The values that the layers hold while they run, one after the other, on a chunk of frames.

    frames, pixels, channels: the size of the activation between two layers. past: the values that the causal layers
    remember. working: the most values that are held beside them. kept: the values that are
    held until the end of a block.
    """

    frames: int
    pixels: int
    channels: int
    past: int = 0
    working: int = 0
    kept: int = 0

    @property
    def size(self) -> int:
        """The values of the activation."""
        return self.frames * self.pixels * self.channels

    def run(self, blocks: Iterable[EncoderBlock]) -> None:
        """Count blocks."""
        for block in blocks:
            if block.shortcut is not None:
                times = min(self.frames, block.shortcut.times)
                self.kept = self.size // (self.channels * times * block.shortcut.side**2) * block.shortcut.out_channels
                self._hold(self.size + 2 * block.shortcut.times * self.pixels * self.channels)
            entered, first = self.size, block.steps[0]
            self._step(first)
            if not isinstance(first, Resnet | Attention) or (isinstance(first, Resnet) and first.shortcut):
                self.kept += entered  # the caller of the block holds its input, unless it is overwritten
            for step in block.steps[1:]:
                self._step(step)
            self.kept = 0

    def conv(self, out_channels: int, beside: int = 0) -> None:
        """Count a causal 3x3x3 convolution: it remembers two frames of its input, and holds the next two meanwhile."""
        remembered = (TAPS - 1) * self.pixels * self.channels
        self.past += remembered
        self._hold(self.size + self.frames * self.pixels * out_channels + remembered + beside)
        self.channels = out_channels

    def _hold(self, values: int) -> None:
        self.working = max(self.working, values + self.kept)

    def _step(self, step: EncoderStep) -> None:
        match step:
            case Resnet():
                entered = self.size
                self.conv(step.conv1.out_channels)
                self.conv(step.conv2.out_channels, beside=entered if step.shortcut else 0)
            case Attention():
                positions = self.frames * self.pixels
                self._hold(6 * positions * self.channels)  # the activation; one frame's tokens, key, value and output
            case Downsample():
                self._downsample(step)
            case Fold():
                entered = self.size
                self.conv(step.conv.out_channels)
                self.frames, self.pixels = -(-self.frames // step.times), self.pixels // 4
                folded = self.frames * self.pixels * step.out_channels
                self.channels = step.out_channels
                # The input; the convolution's output and its folded copy, or later the folded input, frame by frame.
                self._hold(entered + 2 * max(folded, entered // self.frames))

    def _downsample(self, step: Downsample) -> None:
        self._hold(self.size + self.size // 4)
        self.pixels //= 4
        if step.time is None:
            return
        self.past += self.pixels * self.channels
        # The input with one frame before it, and the same three times side by side for half of the frames; the output.
        self._hold(self.size + (self.frames + 1) * self.pixels * self.channels + 2 * self.size)
        self.frames = -(-self.frames // 2)


def held_bytes(encoder: CausalEncoder, latent_frames: int, height: int, width: int) -> Callable[[int], int]:
    """Return a function from the rows of a slab to the bytes that an encode holds, without the bands of rows.

    height, width: the size of the front's output. A slab of `height` rows means whole frames, whose front's output goes
    on at once. The output of lower slabs is stored for all frames of the video.
    """
    halo, ratio = halo_rows(encoder), encoder.front_ratio() // encoder.patch
    frames = 1 if latent_frames == 1 else encoder.chunk_frames

    def held(rows: int) -> int:
        is_whole = rows >= height
        computed = height if is_whole else min(height, rows + 2 * halo)
        front = Account(frames, computed * width * ratio**2, encoder.in_channels)
        pixels = front.size
        front.conv(encoder.conv_in.out_channels)
        front.run(encoder.front)
        back = Account(front.frames, height * width, front.channels)
        back.run(encoder.back)
        back.conv(encoder.conv_out.out_channels, beside=back.size)
        seen = 4 * latent_frames * back.pixels * back.channels if encoder.sees_past else 0  # keys, values, their copies
        if is_whole:
            values = front.past + back.past + max(front.working + pixels, back.working) + seen
        else:
            stored = latent_frames * height * width * front.channels
            values = stored + max(front.past + front.working + pixels, back.past + back.working + seen)
        return values * encoder.dtype.itemsize

    return held
