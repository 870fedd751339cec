"""Check that a video VAE has exactly the layers that our coders compute.

Each function yields a sentence for every difference, and nothing if there is none. name: what the module is called in
these sentences. The checks of one family are in its own module. Everything unknown is a reason to run diffusers' own
layers.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn


def conv_reasons(
    name: str,
    conv: Any,
    kernel: tuple[int, ...],
    padding: tuple[int, ...] = (0, 0, 0),
    stride: tuple[int, ...] | None = None,
    modes: Container[str] = ("zeros",),
) -> Iterator[str]:
    """Check a convolution.

    padding: what the convolution itself adds, by axis. stride: by axis; None means 1. modes: known modes of padding.
    """
    kind = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
    ones = (1,) * len(kernel)
    known = (
        isinstance(conv, kind)
        and conv.kernel_size == kernel
        and tuple(conv.padding) == padding[: len(kernel)]
        and (conv.stride, conv.dilation, conv.groups) == (stride or ones, ones, 1)
        and conv.padding_mode in modes
        and conv.bias is not None
    )
    if not known:
        yield f"{name} is not a plain convolution with a kernel of {'x'.join(map(str, kernel))}."


def norm_reasons(name: str, norm: Any, kind: str) -> Iterator[str]:
    """Check a norm over the channels of each pixel, with a weight and without a bias."""
    known = (
        type(norm).__name__ == kind
        and norm.channel_first
        and not isinstance(norm.bias, torch.Tensor)
        and norm.bias == 0
        and abs(norm.scale - norm.gamma.numel() ** 0.5) < 1e-6
    )
    if not known:
        yield f"{name} is not a {kind} without a bias."


def silu_reasons(name: str, activation: Any) -> Iterator[str]:
    """Check that an activation function is SiLU."""
    if type(activation) is not nn.SiLU:
        yield f"{name} is a {type(activation).__name__}, not SiLU."


def class_reasons(name: str, module: Any, kind: str, children: set[str]) -> Iterator[str]:
    """Check the class of a module, and that it has no other parts than these."""
    if type(module).__name__ != kind:
        yield f"{name} is a {type(module).__name__}, not a {kind}."
        return
    unknown = {child for child, _ in module.named_children()} - children
    if unknown:
        yield f"{name} has unknown parts: {', '.join(sorted(unknown))}."


def chunk_reasons(frames: int, ratio: int) -> Iterator[str]:
    """Check the frames that are encoded together. ratio: the frames that become one latent frame."""
    if frames % ratio:
        yield f"It encodes {frames} frames at a time, which is not a multiple of {ratio}."


def weights_reasons(module: nn.Module) -> Iterator[str]:
    """Check that all weights have one dtype and are on one device."""
    if len({(weight.dtype, weight.device) for weight in module.parameters()}) != 1:
        yield "Its weights are in more than one dtype or on more than one device."
