"""The exact decoder of AutoencoderKLHunyuanVideo: diffusers' untiled decode, computed in chunks of frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock
from torch import Tensor, nn

from ....model_info import EXACT
from ....values import Layout
from ...kernels.choice import kernels_for
from ...kernels.reference import Kernels
from ...memory import free_bytes
from ..image.layers import Conv, Linear, Resnet, empty, fold_upsample, take_linear, take_norm, take_steps
from ..image.structure import attention_reasons, norm_reasons
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from . import hunyuan_passes as passes

QUERY_BYTES = 256 << 20  # the size of one chunk of the attention's scores
# The size of one chunk of frames.
CPU_CHUNK_BYTES = 16 << 20
GPU_CHUNK_BYTES = 1 << 30
# How many chunks a layer holds beside the stored activations: the normalized chunk, three frames side by side for each
# frame, and the output of the convolution, twice for an upsample.
WORKING_CHUNKS = 8


class ExactHunyuanVideoDecoder:
    """A decoder with the weights of an AutoencoderKLHunyuanVideo, its `post_quant_conv` included.

    It computes what diffusers computes with `use_framewise_decoding` off: no temporal tiles, no blending. Two whole
    activations are always stored. The memory budget limits only the chunks beside them.
    """

    name = EXACT
    heeds_budget = True

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return None if this decoder can run the VAE, else one sentence that names the part it cannot run."""
        return next(_reasons(vae), None)

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        """Take the weights out of `vae.decoder` and `vae.post_quant_conv`: `vae.decode` no longer works afterwards."""
        weight = vae.decoder.conv_in.conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.kernels = kernels_for(self.device, self.dtype)
        self.network = _take(vae, self.kernels)

    def free_caches(self) -> None:
        """Do nothing, because this decoder caches nothing between calls."""

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # [B, C, F, h, w]
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says.

        The result equals diffusers' untiled `decode` within the rounding of the dtype.
        """
        latents = latents.to(self.device, self.dtype)
        batch, _, _, height, width = latents.shape
        steps = [step for step in self.network.steps if isinstance(step, passes.Upsample)]
        ratio, frames = 2 ** len(steps), latents.shape[2]
        for step in steps:
            frames = 2 * frames - 1 if step.grows_in_time else frames
        shape = (batch * frames, ratio * height, ratio * width, self.network.conv_out.out_channels)
        output = Output(layout, shape, latents)
        chunk_bytes = self._chunk_bytes(frames, shape[1] * shape[2], budget_bytes)
        for index, one in enumerate(latents):  # [C, F, h, w]

            def write(frame: int, sample: Tensor, start: int = index * frames) -> None:
                output.write(start + frame, 0, sample)
                if emit is not None:
                    emit(output.tensor[start + frame : start + frame + len(sample)])

            passes.decode(self.network, self.kernels, chunk_bytes, QUERY_BYTES, one, write, check)
        if layout is not Layout.SAMPLE:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)

    def _chunk_bytes(self, frames: int, pixels: int, budget_bytes: int | None) -> int:
        """Return the size of a chunk, chosen to fit the budget beside two whole activations of the largest stage."""
        stored: int = frames * pixels * self.network.norm_out.weight.numel() * self.dtype.itemsize
        return chunk_bytes_within(stored, self.device, budget_bytes)


def chunk_bytes_within(activation_bytes: int, device: torch.device, budget_bytes: int | None) -> int:
    """Return the size of a chunk, chosen to fit the budget beside two whole activations of the largest stage."""
    wanted = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    budget = free_bytes(device) if budget_bytes is None else budget_bytes
    return max(1, min(wanted, (budget - 2 * activation_bytes) // WORKING_CHUNKS))


def _take(vae: Any, kernels: Kernels) -> passes.VideoWeights:
    decoder = vae.decoder
    return passes.VideoWeights(
        post_quant=take_linear(vae.post_quant_conv),
        conv_in=take_conv(decoder.conv_in, kernels),
        steps=tuple(_take_steps(decoder, kernels)),
        norm_out=take_norm(decoder.conv_norm_out),
        conv_out=take_conv(decoder.conv_out, kernels),
    )


def _take_steps(decoder: Any, kernels: Kernels) -> Iterator[passes.Step]:
    def resnet(block: Any) -> passes.Step:
        return take_resnet(block, kernels)

    def upsample(upsampler: Any) -> passes.Step:
        return _take_upsample(upsampler, kernels)

    return take_steps(decoder, resnet, upsample)


def take_resnet(block: Any, kernels: Kernels) -> Resnet:
    """Take the weights out of a residual block."""
    shortcut: Linear | None = None if block.conv_shortcut is None else take_linear(block.conv_shortcut.conv)
    conv1, conv2 = take_conv(block.conv1, kernels), take_conv(block.conv2, kernels)
    return Resnet(take_norm(block.norm1), conv1, take_norm(block.norm2), conv2, shortcut)


def take_conv(causal: Any, kernels: Kernels) -> Conv:
    """Take a causal convolution, for the channels of three frames side by side."""
    stride: int = causal.conv.stride[-1]
    weight, bias = take_causal_weights(causal)  # [O, I, 3, 3, 3], [O]
    return Conv(kernels.pack(side_by_side(weight), stride), bias, len(bias))


def _take_upsample(upsampler: Any, kernels: Kernels) -> passes.Upsample:
    weight, bias = take_causal_weights(upsampler.conv)  # [O, I, 3, 3, 3], [O]
    grows_in_time = upsampler.upsample_factor[0] == 2
    in_time = fold_time(weight.float()) if grows_in_time else [weight.float()]  # each [O, I, 2 or 3, 3, 3]
    phases = torch.cat([fold_upsample(side_by_side(phase)) for phase in in_time])  # [T 4 O, ..., 2, 2]
    # The convolution adds the bias to every phase. Adding it afterwards would round once more.
    biases = bias.repeat(len(phases) // len(bias))  # [T 4 O]
    return passes.Upsample(Conv(kernels.pack(phases.to(weight.dtype)), biases, len(biases)), grows_in_time)


def side_by_side(weight: Tensor) -> Tensor:  # [O, I, k, 3, 3] -> [O, k I, 3, 3]
    """Turn a 3D kernel into a 2D one whose input channels are those of k frames side by side."""
    return weight.transpose(1, 2).flatten(1, 2)


def fold_time(weight: Tensor) -> list[Tensor]:  # [O, I, 3, 3, 3] -> two of [O, I, 2, 3, 3]
    """Fold a doubling of frames into the causal convolution that follows it. Return one kernel for each copy.

    After the doubling, the first copy of frame k reads the frames k-1, k-1, k and the second copy k-1, k, k, so two
    taps are enough. Frame 0 is not doubled; its single copy is computed like a second one.
    """
    first, middle, last = weight.unbind(2)  # [O, I, 3, 3]
    return [torch.stack([first + middle, last], 2), torch.stack([first, middle + last], 2)]  # [O, I, 2, 3, 3]


def take_causal_weights(causal: Any) -> tuple[Tensor, Tensor]:
    """Take the weight and the bias of a causal convolution."""
    weight, bias = causal.conv.weight.detach(), causal.conv.bias.detach()  # [O, I, 3, 3, 3], [O]
    empty(causal.conv)
    return weight, bias


def _reasons(vae: Any) -> Iterator[str]:
    if type(vae) is not AutoencoderKLHunyuanVideo:
        yield f"{type(vae).__name__} is not an AutoencoderKLHunyuanVideo."
        return
    own = {stock.HunyuanVideoDecoder3D, stock.HunyuanVideoUpBlock3D, stock.HunyuanVideoUpsampleCausal3D}
    yield from part_reasons("decoder", vae.decoder, own)


def part_reasons(part: str, network: nn.Module, own: set[type[nn.Module]]) -> Iterator[str]:
    """Check the decoder or the encoder. part: its name. own: the classes that only this part has."""
    known = {
        stock.HunyuanVideoMidBlock3D,
        stock.HunyuanVideoResnetBlockCausal3D,
        stock.HunyuanVideoCausalConv3d,
        StockAttention,
        nn.ModuleList,
        nn.Conv3d,
        nn.GroupNorm,
        nn.SiLU,
        nn.Linear,
        nn.Dropout,
        *own,
    }
    halving = {
        f"{name}.conv"
        for name, module in network.named_modules()
        if type(module) is stock.HunyuanVideoDownsampleCausal3D
    }
    for name, module in network.named_modules():
        if type(module) not in known:
            yield f"{part}.{name} is a {type(module).__name__}."
        elif isinstance(module, StockAttention):
            yield from attention_reasons(f"{part}.{name}", module)
        elif isinstance(module, nn.GroupNorm):
            yield from norm_reasons(f"{part}.{name}", module)
        elif isinstance(module, stock.HunyuanVideoCausalConv3d) and not _is_plain_conv(module, name in halving):
            yield f"{part}.{name} is not a plain causal convolution."
        elif isinstance(module, stock.HunyuanVideoUpsampleCausal3D) and not _is_known_upsample(module):
            yield f"{part}.{name} upsamples by {module.upsample_factor}."
    if len({(parameter.dtype, parameter.device) for parameter in network.parameters()}) != 1:
        yield f"Its {part}'s weights are in more than one dtype or on more than one device."


def _is_plain_conv(causal: Any, is_halving: bool) -> bool:
    """Return whether a causal convolution is known. is_halving: it halves rows and columns, and may halve frames."""
    conv = causal.conv
    size: int = conv.kernel_size[0]
    strides = ((1, 2, 2), (2, 2, 2)) if is_halving else ((1, 1, 1),)
    return (
        causal.pad_mode == "replicate"
        and size in (1, 3)
        and conv.kernel_size == (size,) * 3
        and causal.time_causal_padding == (size // 2,) * 4 + (size - 1, 0)
        and conv.stride in strides
        and conv.dilation == (1, 1, 1)
        and conv.padding == (0, 0, 0)
        and conv.groups == 1
        and conv.bias is not None
    )


def _is_known_upsample(upsampler: Any) -> bool:
    return tuple(upsampler.upsample_factor) in ((1, 2, 2), (2, 2, 2))
