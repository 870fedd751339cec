"""The encoders of LTX-Video and LTX-2: check that the structure is known, and take the weights.

They are causal, unlike the decoders: the frames before a video repeat its first one. Rows and columns around a frame
are zero. `ltx_layers.py` has the decoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...kernels.causal_kernels import CausalKernels
from .causal_encoder_layers import Beside, CausalEncoder, EncoderBlock, EncoderStep, Fold
from .causal_layers import Before, CausalConv, PixelRms, Resnet
from .causal_structure import class_reasons, silu_reasons, weights_reasons
from .causal_weights import take_causal_conv, take_causal_downsample
from .ltx_layers import PREFIXES, frames_conv_reasons, resnet_reasons, rms_reasons, take_shortcut

HALVING = (2, 2, 2)  # the stride of a convolution that halves the size
FOLDED = ((1, 2, 2), (2, 1, 1), HALVING)
"""How many frames, rows and columns become channels."""


def encoder_reason(vae: Any) -> str | None:
    """Return the first reason why the causal encoder cannot run this VAE; None if it can."""
    return next(_reasons(vae), None)


def _reasons(vae: Any) -> Iterator[str]:
    prefix, encoder = PREFIXES[type(vae).__name__], vae.encoder
    parts = {"conv_in", "down_blocks", "mid_block", "norm_out", "conv_act", "conv_out"}
    yield from class_reasons("encoder", encoder, f"{prefix}Encoder3d", parts)
    if encoder.patch_size_t != 1:
        yield "Its encoder takes patches of more than one frame."
    if not vae.config.encoder_causal:
        yield "Its encoder reads frames ahead."
    yield from _conv("conv_in", encoder.conv_in, prefix)
    yield from rms_reasons("norm_out", encoder.norm_out)
    yield from silu_reasons("conv_act", encoder.conv_act)
    yield from _conv("conv_out", encoder.conv_out, prefix)
    yield from class_reasons("mid_block", encoder.mid_block, f"{prefix}MidBlock3d", {"resnets"})
    yield from _resnets("mid_block.resnets", encoder.mid_block.resnets, prefix)
    for index, block in enumerate(encoder.down_blocks):
        name = f"down_blocks.{index}"
        # LTX-Video has two kinds of blocks, one of them since 0.9.5; LTX-2 has one.
        kind = type(block).__name__
        known = kind if kind in (f"{prefix}DownBlock3D", f"{prefix}095DownBlock3D") else f"{prefix}DownBlock3D"
        yield from class_reasons(name, block, known, {"resnets", "downsamplers", "conv_out"})
        yield from _resnets(f"{name}.resnets", block.resnets, prefix)
        for downsampler in block.downsamplers or ():
            yield from _downsampler(f"{name}.downsampler", downsampler, prefix)
        if _last_of(block) is not None:
            yield from _resnets(f"{name}.conv_out", [_last_of(block)], prefix)
    yield from weights_reasons(encoder)


def _downsampler(name: str, downsampler: Any, prefix: str) -> Iterator[str]:
    if _is_conv(downsampler, prefix):
        yield from _conv(name, downsampler, prefix, HALVING)
        return
    yield from class_reasons(name, downsampler, f"{prefix}Downsampler3d", {"conv"})
    yield from _conv(f"{name}.conv", downsampler.conv, prefix)
    if downsampler.stride not in FOLDED:
        yield f"{name} makes one pixel of {'x'.join(map(str, downsampler.stride))}."
        return
    conv, (times, side, _) = downsampler.conv.conv, downsampler.stride
    if downsampler.group_size * conv.out_channels != conv.in_channels:
        yield f"{name} averages {downsampler.group_size} channels of {conv.in_channels * times * side**2}."


def _resnets(name: str, resnets: Any, prefix: str) -> Iterator[str]:
    for index, resnet in enumerate(resnets):
        yield from resnet_reasons(f"{name}.{index}", resnet, prefix)
        for part in ("conv1", "conv2"):
            yield from _conv(f"{name}.{index}.{part}", resnet.get_submodule(part), prefix)
        if resnet.scale_shift_table is not None:
            yield f"{name}.{index} takes a timestep."


def _conv(name: str, conv: Any, prefix: str, stride: tuple[int, ...] | None = None) -> Iterator[str]:
    """Check a convolution. stride: by axis; None means 1."""
    yield from frames_conv_reasons(name, conv, prefix, stride)
    if conv.conv.padding_mode != "zeros":
        yield f"{name} pads by {conv.conv.padding_mode}."


def _is_conv(downsampler: Any, prefix: str) -> bool:
    """Return whether a downsampler is a convolution with a stride, and not one whose output is folded."""
    return type(downsampler).__name__ == f"{prefix}CausalConv3d"


def _last_of(block: Any) -> Any:
    """Return the residual block after a downsampler, which changes the channels; None if there is none."""
    return getattr(block, "conv_out", None)


def take_encoder(vae: Any, kernels: CausalKernels) -> CausalEncoder:
    """Move the weights out of a VAE whose structure is known. Its own encode no longer works afterwards."""
    prefix, encoder = PREFIXES[type(vae).__name__], vae.encoder
    weight = encoder.conv_in.conv.weight
    dtype, device, in_channels = weight.dtype, weight.device, weight.shape[1]
    conv_in, only_multiples_of = _take_conv(encoder.conv_in, kernels), _ignored_chunk(encoder, prefix)
    blocks = tuple(EncoderBlock((step,)) for step in _take_steps(encoder, kernels, prefix))
    conv_out = _take_conv(encoder.conv_out, kernels)
    return CausalEncoder(
        patch=encoder.patch_size,
        conv_in=conv_in,
        in_channels=in_channels,
        blocks=blocks,
        norm_out=PixelRms(encoder.norm_out.eps),
        conv_out=conv_out,
        averages_output=False,
        quant=None,
        dtype=dtype,
        device=device,
        only_multiples_of=only_multiples_of,
        # The last channel is the variance of all channels of the mean.
        repeats_last=conv_out.out_channels - 2,
    )


def _ignored_chunk(encoder: Any, prefix: str) -> int | None:
    """Return how many frames make one in the convolutions that come first, if diffusers ignores those left over.

    A convolution ignores frames at the end that fill no step of its stride. Layers that are folded refuse them.
    """
    frames = 1
    for block in encoder.down_blocks:
        for downsampler in block.downsamplers or ():
            if not _is_conv(downsampler, prefix):
                return None if frames == 1 else frames
            frames *= downsampler.conv.stride[0]
    return frames


def _take_steps(encoder: Any, kernels: CausalKernels, prefix: str) -> Iterator[EncoderStep]:
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield _take_resnet(resnet, kernels)
        for downsampler in block.downsamplers or ():
            if _is_conv(downsampler, prefix):
                yield take_causal_downsample(downsampler.conv, kernels, Beside.ZEROS_BEFORE)
            else:
                yield _take_fold(downsampler, kernels)
        if _last_of(block) is not None:
            yield _take_resnet(_last_of(block), kernels)
    for resnet in encoder.mid_block.resnets:
        yield _take_resnet(resnet, kernels)


def _take_fold(downsampler: Any, kernels: CausalKernels) -> Fold:
    times, side, _ = downsampler.stride
    conv = _take_conv(downsampler.conv, kernels)
    return Fold(conv, times, conv.out_channels * times * side**2, side, channel_first=True)


def _take_resnet(resnet: Any, kernels: CausalKernels) -> Resnet:
    conv1, conv2 = _take_conv(resnet.conv1, kernels), _take_conv(resnet.conv2, kernels)
    return Resnet(PixelRms(resnet.norm1.eps), conv1, PixelRms(resnet.norm2.eps), conv2, take_shortcut(resnet))


def _take_conv(conv: Any, kernels: CausalKernels) -> CausalConv:
    return take_causal_conv(conv.conv, kernels, Before.FIRST_FRAME)
