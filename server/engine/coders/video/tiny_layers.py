"""The networks of the TAEHV family: tiny VAEs of video models, for previews.

The layers have the numbers that name them in the published files, https://github.com/madebyollin/taehv and, for Mochi,
https://github.com/madebyollin/taem1. So the tensors of these files load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..interface import Check, go_on

WIDTHS = (256, 128, 64, 64)
SUPER_WIDTHS = (512, 256, 128, 64)
ENCODER_WIDTH = 64
BLOCKS = 3  # in each of the three stages
SCALE = 8  # of the three stages together, along each side
CLIP_FRAMES = 17  # of MiniMax-H3, as the next two
CLIP_LATENTS = 5
DROPPED_LATENTS = 3


def conv(channels: int, out: int, **arguments: Any) -> nn.Conv2d:
    """Return a convolution with a kernel of 3x3 that keeps the size, unless it has a stride."""
    return nn.Conv2d(channels, out, 3, padding=1, **arguments)


class Clamp(nn.Module):
    """Limits values softly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return values of the same shape."""
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """A residual block that also sees its own input of the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # [1, C, h, w] each
        """Return one frame."""
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class SuperMemory(nn.Module):
    """The block of the larger decoders: a depthwise convolution and two layers that mix the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # [1, C, h, w] each
        """Return one frame."""
        mixed: Tensor = self.conv(torch.cat([x, before], 1)) + x
        return mixed


class Pool(nn.Module):
    """Makes one frame of `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, frames: Sequence[Tensor]) -> Tensor:  # [1, C, h, w] each
        """Return one frame."""
        pooled: Tensor = self.conv(torch.cat(list(frames), 1))
        return pooled


class Grow(nn.Module):
    """Makes `stride` frames of one frame."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Sequence[Tensor]:  # [1, C, h, w]
        """Return the frames, each of the shape of `x`."""
        frames: Tensor = self.conv(x)
        return frames.chunk(self.stride, 1)


class Through:
    """Frames on their way through a network, one after the other.

    It holds one earlier frame for each block, and nothing that grows with the length of the video.

    check: called before each layer.
    """

    def __init__(self, layers: nn.Sequential, check: Check = go_on) -> None:
        self._layers = list(layers)
        self._check = check
        self._before: dict[int, Tensor] = {}
        self._waiting: dict[int, list[Tensor]] = {}

    def send(self, x: Tensor, first: int = 0) -> Iterator[Tensor]:  # [1, C, h, w]
        """Send one frame through the layers from `first` on. Yield the frames that come out, which may be none."""
        for at in range(first, len(self._layers)):
            self._check()
            layer = self._layers[at]
            if isinstance(layer, Memory | SuperMemory):
                before = self._before.get(at)
                self._before[at] = x
                x = layer(x, torch.zeros_like(x) if before is None else before)
            elif isinstance(layer, Pool):
                frames = self._waiting.pop(at, [])
                frames.append(x)
                if len(frames) < layer.stride:
                    self._waiting[at] = frames
                    return
                x = layer(frames)
            elif isinstance(layer, Grow):
                for frame in layer(x):
                    yield from self.send(frame, at + 1)
                return
            else:
                x = layer(x)
        yield x


class TAEHV(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers leaves its classes untyped
    """A tiny VAE for the latents of a video model, as the model makes them, without scaling.

    It stores colours in [0, 1]. `decode` and `encode` use [-1, 1], as diffusers' classes do.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # likewise
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_time_strides: tuple[int, ...] = (2, 2, 1),
        decoder_time_strides: tuple[int, ...] = (1, 2, 2),
        is_super: bool = False,
    ) -> None:
        """Build the network.

        patch_size: side of the squares of pixels that the network sees as one. encoder_time_strides,
        decoder_time_strides: for each stage, how many frames become one, or how many one becomes. is_super: build the
        larger decoder.
        """
        super().__init__()
        colours = 3 * patch_size**2
        decoder = _super_decoder if is_super else _decoder
        self.encoder = nn.Sequential(*_encoder(colours, latent_channels, encoder_time_strides))
        self.decoder = nn.Sequential(*decoder(latent_channels, colours, decoder_time_strides))
        self.frames_per_latent = prod(decoder_time_strides)
        self.latent_stride = prod(encoder_time_strides)

    def kept(self, latent_frames: int) -> list[bool]:
        """Return for each frame that leaves the decoder whether it is part of the video.

        The first latent frame stands for one frame, so all that it decodes to but the last are dropped.
        """
        dropped = self.frames_per_latent - 1
        return [index >= dropped for index in range(latent_frames * self.frames_per_latent)]

    def decode_frames(self, video: Tensor, check: Check = go_on) -> Iterator[Tensor]:  # [C, F, h, w]
        """Decode one video. Yield its frames in order, `[1, 3, H, W]` in [-1, 1]. check: called before each layer."""
        through = Through(self.decoder, check)
        keep = iter(self.kept(video.shape[1]))
        for latent in video.unbind(1):
            for frame in through.send(latent[None]):
                if next(keep):
                    yield 2 * F.pixel_shuffle(frame, self.config.patch_size).clamp(0, 1) - 1

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:  # [B, C, F, h, w]
        """Decode videos. Return the sample, `[B, 3, F, H, W]` in [-1, 1], in a tuple as diffusers does."""
        return (torch.stack([torch.cat(list(self.decode_frames(video))) for video in latents]).transpose(1, 2),)

    def encode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Tensor]:  # [B, 3, F, H, W] in [-1, 1]
        """Encode videos. Return the latents, `[B, C, f, h, w]`, in a tuple as diffusers does."""
        return (torch.stack([self._encode_video(video / 2 + 0.5) for video in pixels]),)

    def _encode_video(self, video: Tensor) -> Tensor:  # [3, F, H, W] in [0, 1] -> [C, f, h, w]
        """Encode one video, whose last frame is repeated to fill a latent frame."""
        return self._encode_frames(repeat_last(video, self.latent_stride))

    def _encode_frames(self, video: Tensor) -> Tensor:  # [3, F, H, W] -> [C, f, h, w]
        through = Through(self.encoder)
        frames = (F.pixel_unshuffle(frame[None], self.config.patch_size) for frame in video.unbind(1))
        return torch.cat([latent for frame in frames for latent in through.send(frame)]).transpose(0, 1)

    def enable_tiling(self) -> None:
        """Raise NotImplementedError: videos are decoded frame by frame, and diffusers has no tiles for them."""
        raise NotImplementedError("this class has no tiles; set tiling: none in models.yaml")


class TAELTX(TAEHV):
    """The tiny VAE of LTX-2 and LTX-2.3."""


class TAECVX(TAEHV):
    """The tiny VAE of CogVideoX, which drops no frames if the number of latent frames is even."""

    def kept(self, latent_frames: int) -> list[bool]:
        """Return for each frame that leaves the decoder whether it is part of the video."""
        if latent_frames % 2:
            return super().kept(latent_frames)
        return [True] * (latent_frames * self.frames_per_latent)


class TAEH3(TAEHV):
    """The tiny VAE of MiniMax-H3: each clip of 17 frames has 5 latent frames, and the last 3 of a video are dropped."""

    def kept(self, latent_frames: int) -> list[bool]:
        """Return for each frame that leaves the decoder whether it is part of the video.

        latent_frames: 5 n + 2, so that the frames that follow the video would all come from latent frames that are
        not there.
        """
        ratio = self.frames_per_latent
        return [index % (CLIP_LATENTS * ratio) >= ratio - 1 for index in range(latent_frames * ratio)]

    def _encode_video(self, video: Tensor) -> Tensor:  # [3, F, H, W] in [0, 1] -> [C, f, h, w]
        """Encode clip by clip. Black frames fill the first latent frame of each."""
        clips = torch.split(repeat_last(video, CLIP_FRAMES), CLIP_FRAMES, dim=1)
        black = video.new_zeros(()).expand(len(video), self.latent_stride - 1, *video.shape[2:])
        latents = [self._encode_frames(torch.cat([black, clip], 1)) for clip in clips]
        return torch.cat(latents, 1)[:, :-DROPPED_LATENTS]


def repeat_last(video: Tensor, multiple: int) -> Tensor:  # [C, F, H, W]
    """Return a video whose last frame is repeated until the number of frames is a multiple of `multiple`."""
    missing = -video.shape[1] % multiple
    return torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1)], 1)


def _encoder(colours: int, channels: int, strides: Sequence[int]) -> Iterator[nn.Module]:
    yield from (conv(colours, ENCODER_WIDTH), nn.ReLU())
    for stride in strides:
        yield Pool(ENCODER_WIDTH, stride)
        yield conv(ENCODER_WIDTH, ENCODER_WIDTH, stride=2, bias=False)
        yield from (Memory(ENCODER_WIDTH) for _ in range(BLOCKS))
    yield conv(ENCODER_WIDTH, channels)


def _decoder(channels: int, colours: int, strides: Sequence[int]) -> Iterator[nn.Module]:
    yield from (Clamp(), conv(channels, WIDTHS[0]), nn.ReLU())
    for stride, width, out in zip(strides, WIDTHS, WIDTHS[1:], strict=False):
        yield from (Memory(width) for _ in range(BLOCKS))
        yield from (nn.Upsample(scale_factor=2), Grow(width, stride), conv(width, out, bias=False))
    yield from (nn.ReLU(), conv(WIDTHS[-1], colours))


def _super_decoder(channels: int, colours: int, strides: Sequence[int]) -> Iterator[nn.Module]:
    yield nn.Conv2d(channels, SUPER_WIDTHS[0], 1, bias=False)
    for stride, width, out in zip(strides, SUPER_WIDTHS, SUPER_WIDTHS[1:], strict=False):
        yield from (SuperMemory(width) for _ in range(BLOCKS))
        yield from (conv(width, 4 * out), nn.ReLU(), nn.PixelShuffle(2), Grow(out, stride))
    yield conv(SUPER_WIDTHS[-1], colours)


TINY_CLASSES: dict[str, type[TAEHV]] = {each.__name__: each for each in (TAEHV, TAELTX, TAECVX, TAEH3)}
"""The classes of this family by their names, which a config has as `_class_name`."""
