"""Tensors whose memory the client freed before it sent it.

`remote_decode` and `remote_encode` of diffusers 0.42 copy a tensor that is on a GPU to the CPU, free the copy and send
its memory anyway. By then the allocator has overwritten part of that memory: on Linux the first 16 bytes with two
addresses, and often later bytes with other objects. The remaining bytes are still the tensor's, so the decoded image
would look almost right.
"""

from __future__ import annotations

import struct

import torch

from ..values import RawTensor

ABSURD = 1e4  # values and ratios above this do not occur in latents
# Addresses of the heap and the libraries of a process on 64-bit Linux.
ADDRESSES = range(0x5500_0000_0000, 0x8000_0000_0000, 16)

ADVICE = (
    "if it was on a GPU, send {name}.cpu().contiguous(): diffusers' client frees the CPU copy of such a tensor before "
    "it sends it"
)


def looks_freed(tensor: RawTensor, values: torch.Tensor) -> bool:
    """Return whether a tensor of finite values was sent from freed memory.

    tensor: as it was sent, a float dtype. values: the same in float32, any shape and device.

    It does when a value is more than 10,000 times as large as 1 and as the median magnitude of the values that are not
    zero, or when the first 16 bytes are two addresses. Honest latents have neither:

    - A pipeline's latents are about 1: samplers start from unit noise, and the scaling factors and statistics of all
      families here change that by less than 10 times. Of a billion normal values the largest is 9 times the median.
      An outlier of 1,000 times the median is accepted all the same.
    - A constant factor scales the median too. Zeros are left out of the median, so that a few values among zeros are
      compared with each other. Values below 10,000 are never refused by this rule.
    - An address in float32 ends in a denormal number, which no arithmetic with latents gives twice at these places. In
      half precision it ends in a large value, which must be 16 times the median, and an exact zero, both twice.
    """
    largest = float(values.abs().max())
    if largest > ABSURD and largest > ABSURD * _typical(values):
        return True
    if not _begins_with_addresses(tensor):
        return False
    return tensor.dtype == "float32" or float(values.flatten()[2]) > 16 * _typical(values)


def _typical(values: torch.Tensor) -> float:
    """Return the median magnitude of the values that are not zero."""
    magnitudes = values.abs()
    return float(magnitudes[magnitudes > 0].median())


def _begins_with_addresses(tensor: RawTensor) -> bool:
    if tensor.data.nbytes < 16:
        return False
    addresses = struct.unpack("<2Q", tensor.data.cast("B")[:16])
    return all(address in ADDRESSES and address % (1 << 32) for address in addresses)
