"""The decoders of LTX-Video and LTX-2 as plain data: check that the structure is known, and take the weights.

A convolution reads the frames t - 2 to t where the decoder is causal, else t - 1 to t + 1. Before and after the video,
its first and last frame are repeated. A convolution that reads one frame ahead makes each frame one frame late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ...kernels.causal_kernels import TAPS, CausalKernels
from ..image.layers import Linear, empty, take_linear
from .causal_layers import NormedLinear, PixelRms
from .causal_passes import Edge
from .causal_structure import class_reasons, conv_reasons, silu_reasons, weights_reasons
from .wan_layers import take_pointwise

PREFIXES = {"AutoencoderKLLTXVideo": "LTXVideo", "AutoencoderKLLTX2Video": "LTX2Video"}
"""The classes that are known, and what the names of their layers begin with."""

EDGES = {"zeros": Edge.ZERO, "replicate": Edge.REPEATED, "reflect": Edge.REFLECTED}
SINES = 256  # sines and cosines that a timestep is embedded as


@dataclass(frozen=True)
class FramesConv:
    """A 3x3x3 convolution.

    weight: packed by `CausalKernels.pack`. lag: how many frames after the current one it reads, 0 or 1: its output is
    so many frames late. edge: what lies around a frame.
    """

    weight: Tensor
    bias: Tensor  # [O]
    in_channels: int
    out_channels: int
    lag: int
    edge: Edge

    @property
    def widest(self) -> int:
        """The larger number of channels, of the input or of the output."""
        return max(self.in_channels, self.out_channels)

    @property
    def frames_before(self) -> int:
        """How many frames before the current one it reads."""
        return TAPS - 1 - self.lag


@dataclass(frozen=True)
class FramesResnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with x through `shortcut` where the channels change.

    table: shift and scale of norm1, then of norm2, to which the embedded timestep is added.
    """

    norm1: PixelRms
    conv1: FramesConv
    norm2: PixelRms
    conv2: FramesConv
    shortcut: NormedLinear | None
    table: Tensor | None  # [4, C]

    @property
    def widest(self) -> int:
        """The largest number of channels of an activation."""
        return self.conv1.widest

    @property
    def lag(self) -> int:
        """How many frames late the output is."""
        return self.conv1.lag + self.conv2.lag


@dataclass(frozen=True)
class Enlarge:
    """A convolution whose output channels are unfolded to more frames, rows and columns.

    Its channels are ordered frame s of `times`, row p and column q of `size`, output channel o. The first frame of the
    video becomes a single one, the last of its `times`. repeats: how often the input, unfolded in the same way, is
    repeated to be added; 0 for never.
    """

    conv: FramesConv
    times: int
    size: int
    repeats: int

    @property
    def widest(self) -> int:
        """The largest number of values of an activation for one pixel of the input."""
        return self.conv.widest

    @property
    def out_channels(self) -> int:
        """The channels of the output."""
        return self.conv.out_channels // (self.times * self.size**2)


@dataclass(frozen=True)
class Last:
    """conv(silu(norm(x))), whose channels are patches of pixels. table: shift and scale of the norm, as in a resnet."""

    norm: PixelRms
    conv: FramesConv
    patch: int
    table: Tensor | None  # [2, C]

    @property
    def widest(self) -> int:
        """The largest number of channels of an activation."""
        return self.conv.widest


Step = FramesConv | FramesResnet | Enlarge | Last


@dataclass(frozen=True)
class Embedder:
    """Embeds a timestep for the tables of a block: linear, SiLU, linear."""

    first: Linear
    second: Linear

    def __call__(self, timestep: Tensor) -> Tensor:  # [1] -> [C']
        """Return the embedding of a timestep, in its dtype."""
        sines = get_timestep_embedding(timestep, SINES, flip_sin_to_cos=True, downscale_freq_shift=0)  # [1, 256]
        hidden = F.silu(F.linear(sines.to(timestep.dtype), self.first.weight, self.first.bias))  # [1, C']
        return F.linear(hidden, self.second.weight, self.second.bias)[0]


@dataclass(frozen=True)
class Block:
    """Steps whose tables use the same embedding, if there is one."""

    steps: tuple[Step, ...]
    embedder: Embedder | None = None


@dataclass(frozen=True)
class FramesDecoder:
    """The weights of a decoder, in the order in which they are used.

    timestep_scale: the factor of the timestep; None if the decoder takes none.
    """

    blocks: tuple[Block, ...]
    timestep_scale: Tensor | None  # []
    dtype: torch.dtype
    device: torch.device

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order: a convolution, resnets and enlargements, and the last convolution."""
        return tuple(step for block in self.blocks for step in block.steps)

    @property
    def last(self) -> Last:
        """The last step."""
        step = self.blocks[-1].steps[-1]
        assert isinstance(step, Last)
        return step

    @property
    def channels(self) -> int:
        """The channels of the sample."""
        return self.last.conv.out_channels // self.last.patch**2

    @property
    def mirrors(self) -> bool:
        """Whether the rows and columns around a frame are its own, mirrored, which needs two of each."""
        return self.last.conv.edge is Edge.REFLECTED

    def spatial_ratio(self) -> int:
        """Return the pixels per latent along one side."""
        ratio = self.last.patch
        for step in self.steps:
            ratio *= step.size if isinstance(step, Enlarge) else 1
        return ratio

    def temporal_ratio(self) -> int:
        """Return the frames per latent frame, except for the first one, which becomes one frame."""
        ratio = 1
        for step in self.steps:
            ratio *= step.times if isinstance(step, Enlarge) else 1
        return ratio

    def at(self, timestep: float) -> FramesDecoder:
        """Return the decoder whose norms have the shifts and scales of a timestep; itself if it takes none."""
        if self.timestep_scale is None:
            return self
        scaled = self.timestep_scale.new_tensor([timestep]) * self.timestep_scale  # [1]
        return replace(self, blocks=tuple(_at(block, scaled) for block in self.blocks))


def _at(block: Block, timestep: Tensor) -> Block:
    if block.embedder is None:
        return block
    embedding = block.embedder(timestep).float()  # [k C]
    return replace(block, steps=tuple(_modulated(step, embedding) for step in block.steps))


def _modulated(step: Step, embedding: Tensor) -> Step:  # [k C]
    if not isinstance(step, FramesResnet | Last) or step.table is None:
        return step
    rows = (embedding.view_as(step.table) + step.table.float()).unbind()  # [C] each
    norms = [PixelRms(_norm_of(step).eps, 1 + scale, shift) for shift, scale in zip(rows[::2], rows[1::2], strict=True)]
    if isinstance(step, Last):
        return replace(step, norm=norms[0])
    return replace(step, norm1=norms[0], norm2=norms[1])


def _norm_of(step: FramesResnet | Last) -> PixelRms:
    return step.norm if isinstance(step, Last) else step.norm1


def decoder_reason(vae: Any) -> str | None:
    """Return the first reason why the decoder of frames cannot run this VAE; None if it can."""
    return next(_reasons(vae), None)


def _reasons(vae: Any) -> Iterator[str]:
    prefix, decoder = PREFIXES[type(vae).__name__], vae.decoder
    parts = {"conv_in", "mid_block", "up_blocks", "norm_out", "conv_act", "conv_out", "time_embedder"}
    yield from class_reasons("decoder", decoder, f"{prefix}Decoder3d", parts)
    if decoder.patch_size_t != 1:
        yield "Its decoder makes patches of more than one frame."
    yield from frames_conv_reasons("conv_in", decoder.conv_in, prefix)
    yield from rms_reasons("norm_out", decoder.norm_out)
    yield from silu_reasons("conv_act", decoder.conv_act)
    yield from frames_conv_reasons("conv_out", decoder.conv_out, prefix)
    yield from _embedder("time_embedder", decoder.time_embedder)
    yield from class_reasons("mid_block", decoder.mid_block, f"{prefix}MidBlock3d", {"resnets", "time_embedder"})
    yield from _block("mid_block", decoder.mid_block, prefix)
    for index, block in enumerate(decoder.up_blocks):
        name = f"up_blocks.{index}"
        parts = {"conv_in", "upsamplers", "resnets", "time_embedder"}
        yield from class_reasons(name, block, f"{prefix}UpBlock3d", parts)
        yield from _up_block(name, block, prefix)
        yield from _block(name, block, prefix)
    yield from weights_reasons(decoder)


def _up_block(name: str, block: Any, prefix: str) -> Iterator[str]:
    if block.conv_in is not None:
        yield from resnet_reasons(f"{name}.conv_in", block.conv_in, prefix)
        if block.time_embedder is not None:
            yield f"{name}.conv_in takes a timestep."
    for upsampler in block.upsamplers or ():
        yield from class_reasons(f"{name}.upsampler", upsampler, f"{prefix}Upsampler3d", {"conv"})
        yield from frames_conv_reasons(f"{name}.upsampler.conv", upsampler.conv, prefix)
        if upsampler.stride[1] != upsampler.stride[2]:
            yield f"{name} upsamples rows and columns by different factors."


def _block(name: str, block: Any, prefix: str) -> Iterator[str]:
    yield from _embedder(f"{name}.time_embedder", block.time_embedder)
    for index, resnet in enumerate(block.resnets):
        yield from resnet_reasons(f"{name}.resnets.{index}", resnet, prefix)
        if (resnet.scale_shift_table is None) != (block.time_embedder is None):
            yield f"{name}.resnets.{index} takes a timestep, but its block does not, or the other way round."


def resnet_reasons(name: str, resnet: Any, prefix: str) -> Iterator[str]:
    """Check a residual block. prefix: what the names of its layers begin with."""
    parts = {"nonlinearity", "norm1", "conv1", "norm2", "dropout", "conv2", "norm3", "conv_shortcut"}
    yield from class_reasons(name, resnet, f"{prefix}ResnetBlock3d", parts)
    if resnet.per_channel_scale1 is not None or resnet.per_channel_scale2 is not None:
        yield "Its decoder adds noise that all frames of a video share."
    yield from silu_reasons(f"{name}.nonlinearity", resnet.nonlinearity)
    for part in ("norm1", "norm2"):
        yield from rms_reasons(f"{name}.{part}", resnet.get_submodule(part))
    for part in ("conv1", "conv2"):
        yield from frames_conv_reasons(f"{name}.{part}", resnet.get_submodule(part), prefix)
    if resnet.conv_shortcut is not None:
        if type(resnet.norm3) is not nn.LayerNorm or resnet.norm3.weight is None or resnet.norm3.bias is None:
            yield f"{name}.norm3 is not a layer norm with weight and bias."
        yield from conv_reasons(f"{name}.conv_shortcut", _inner(resnet.conv_shortcut), (1, 1, 1), modes=EDGES)


def rms_reasons(name: str, norm: Any) -> Iterator[str]:
    """Check a norm over the channels of each pixel."""
    if type(norm) is RMSNorm:
        known = norm.weight is None and norm.bias is None
    else:
        known = type(norm).__name__ == "PerChannelRMSNorm" and norm.channel_dim == 1
    if not known:
        yield f"{name} is not an RMS norm over the channels without weights."


def frames_conv_reasons(name: str, conv: Any, prefix: str, stride: tuple[int, ...] | None = None) -> Iterator[str]:
    """Check a 3x3x3 convolution. stride: by axis; None means 1."""
    yield from class_reasons(name, conv, f"{prefix}CausalConv3d", {"conv"})
    mode = conv.conv.padding_mode
    yield from conv_reasons(f"{name}.conv", conv.conv, (3, 3, 3), (0, 1, 1), stride, modes=(mode,))
    if mode not in EDGES:
        yield f"{name} pads by {mode}."


def _inner(conv: Any) -> Any:
    """Return the convolution itself. LTX-Video's shortcuts are wrapped like the other convolutions, LTX-2's are not."""
    return conv if isinstance(conv, nn.Conv3d) else conv.conv


def _embedder(name: str, embedder: Any) -> Iterator[str]:
    if embedder is None:
        return
    if type(embedder) is not PixArtAlphaCombinedTimestepSizeEmbeddings or embedder.use_additional_conditions:
        yield f"{name} does not embed a timestep only."
        return
    sines, layers = embedder.time_proj, embedder.timestep_embedder
    yield from class_reasons(f"{name}.timestep_embedder", layers, "TimestepEmbedding", {"linear_1", "act", "linear_2"})
    yield from silu_reasons(f"{name}.act", layers.act)
    if (sines.num_channels, sines.flip_sin_to_cos, sines.downscale_freq_shift, sines.scale) != (SINES, True, 0, 1):
        yield f"{name} embeds a timestep in an unknown way."


def take_decoder(vae: Any, kernels: CausalKernels) -> FramesDecoder:
    """Move the weights out of a VAE whose structure is known. Its own decode no longer works afterwards."""
    decoder = vae.decoder
    weight, scale = decoder.conv_in.conv.weight, decoder.timestep_scale_multiplier
    dtype, device, is_causal = weight.dtype, weight.device, bool(vae.config.decoder_causal)

    def conv(module: Any, parts: int = 1) -> FramesConv:
        return _take_conv(module, kernels, is_causal, parts)

    def resnet(module: Any) -> FramesResnet:
        convs = conv(module.conv1), conv(module.conv2)
        norms = PixelRms(module.norm1.eps), PixelRms(module.norm2.eps)
        return FramesResnet(norms[0], convs[0], norms[1], convs[1], take_shortcut(module), _table_of(module))

    def steps(block: Any) -> Iterator[Step]:
        if block.conv_in is not None:
            yield resnet(block.conv_in)
        for upsampler in block.upsamplers or ():
            times, size, _ = upsampler.stride
            parts = times * size**2
            yield Enlarge(
                conv(upsampler.conv, parts),
                times,
                size,
                parts // upsampler.upscale_factor if upsampler.residual else 0,
            )
        yield from map(resnet, block.resnets)

    middle = decoder.mid_block
    blocks = [
        Block((conv(decoder.conv_in),)),
        Block(tuple(map(resnet, middle.resnets)), _take_embedder(middle.time_embedder)),
        *(Block(tuple(steps(block)), _take_embedder(block.time_embedder)) for block in decoder.up_blocks),
    ]
    last = Last(PixelRms(decoder.norm_out.eps), conv(decoder.conv_out), decoder.patch_size, _table_of(decoder))
    blocks.append(Block((last,), _take_embedder(decoder.time_embedder)))
    return FramesDecoder(tuple(blocks), None if scale is None else scale.detach(), dtype, device)


def _take_conv(module: Any, kernels: CausalKernels, is_causal: bool, parts: int) -> FramesConv:
    """Take a 3x3x3 convolution. parts: its output channels (o, part) are reordered to (part, o)."""
    weight, bias = module.conv.weight.detach(), module.conv.bias.detach()  # [O, I, 3, 3, 3], [O]
    empty(module.conv)
    weight = weight.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)  # [O, I, 3, 3, 3]
    bias = bias.unflatten(0, (-1, parts)).transpose(0, 1).flatten().contiguous()  # [O]
    out_channels, in_channels = weight.shape[:2]
    edge = EDGES[module.conv.padding_mode]
    return FramesConv(kernels.pack(weight), bias, in_channels, out_channels, 0 if is_causal else 1, edge)


def take_shortcut(resnet: Any) -> NormedLinear | None:
    """Take the shortcut around a residual block; None if it changes nothing."""
    if resnet.conv_shortcut is None:
        return None
    norm = resnet.norm3
    weight, bias = norm.weight.detach(), norm.bias.detach()  # [C] twice
    empty(norm)
    return NormedLinear(weight, bias, norm.eps, take_pointwise(_inner(resnet.conv_shortcut)))


def _table_of(module: Any) -> Tensor | None:  # [k, C]
    return None if module.scale_shift_table is None else module.scale_shift_table.detach()


def _take_embedder(module: Any) -> Embedder | None:
    if module is None:
        return None
    layers = module.timestep_embedder
    return Embedder(take_linear(layers.linear_1), take_linear(layers.linear_2))
