"""The encoder, layer by layer, each layer a pass over row bands: the decoder's passes, and the downsampling."""

from __future__ import annotations

from torch import Tensor

from server.engine.coder import Check
from server.engine.exact.encoder.network import Network
from server.engine.exact.kernels import Kernels
from server.engine.exact.network import Attention, Conv, Downsample, Resnet
from server.engine.exact.passes import Emit, attention, first, last, padded, resnet, resnet_recomputing
from server.engine.exact.picture import Picture, spans
from server.engine.exact.plan import Plan


def encode(
    network: Network, kernels: Kernels, plan: Plan, pixels: Tensor, emit: Emit, check: Check
) -> None:  # [B, 3, H, W]
    """Run the encoder; `emit(top, parameters [B, n, w, 2 C])` receives the posterior from top to bottom.

    check: called before each band and each chunk of queries.
    """
    picture = first(network.conv_in, kernels, plan, pixels.permute(0, 2, 3, 1).contiguous(), check)
    recomputed = network.full_size if plan.recomputes else range(0)
    for index, step in enumerate(network.steps):
        match step:
            case Resnet() if index in recomputed:
                picture = resnet_recomputing(step, kernels, picture, check)
            case Resnet():
                picture = resnet(step, kernels, picture, check)
            case Attention():
                picture = attention(step, kernels, plan, picture, check)
            case Downsample():
                picture = downsample(step.conv, kernels, plan, picture, check)
    last(network.norm_out, network.conv_out, kernels, picture, emit, check)


def downsample(conv: Conv, kernels: Kernels, plan: Plan, x: Picture, check: Check) -> Picture:
    """Row i sees rows 2i to 2i + 2; the row below the picture and the column to its right are zero."""
    width = x.band(0).shape[2] // 2
    picture = Picture(plan.unit_rows(width, conv.out_channels))
    for top, bottom in spans(x.height // 2, plan.rows(width, conv.out_channels)):
        check()
        y = padded(kernels, x, 2 * top, 2 * bottom + 1, columns=1)  # [B, 2 n + 1, W + 1, C]
        x.release_above(2 * bottom)
        band = kernels.conv(y, conv.weight, conv.bias, columns=0, stride=2)  # [B, n, W / 2, C']
        picture.append(band, kernels.moments(band, picture.unit))
    return picture
