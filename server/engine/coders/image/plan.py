"""How tall the bands are and how many images go together, from the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .layers import Attention, Conv, Downsample, Resnet, Upsample

# Bands of this size stay near a CPU's cores between the norm, the convolution and the statistics: 1.4x faster than one
# band at 512² on two cores. Twice the size is no faster and takes 100 MB more at 1024².
CPU_BAND_BYTES = 4 << 20
# Small pictures share the weights' way from memory: eight of 64x64 take 0.55 of the time one by one, of 128x128 0.85.
CPU_TOGETHER_BYTES = 16 << 20
SCORES_BYTES = 256 << 20

# Beside the stored pictures a pass holds a band with its halo, the convolution's output and its four phases.
WORKING_BANDS = 4
# Recomputing it holds a band of each of the layers that it computes anew.
RECOMPUTING_BANDS = 6
SMALLEST_BAND_BYTES = 1 << 20
# A band's halo is recomputed with it, so low bands cost time: 8 MB were the fastest on a CPU.
RECOMPUTED_BAND_BYTES = 8 << 20
SMALLEST_SCORES_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    images: int  # that go together
    itemsize: int
    band_bytes: int  # one band of an activation
    scores_bytes: int  # one chunk of the attention's scores
    unit_bytes: int = SMALLEST_BAND_BYTES
    recomputes: bool = False  # at the full size, what lies between two layers' outputs

    def unit_rows(self, width: int, channels: int) -> int:
        """Bands are whole units, and a unit's statistics are taken by themselves, whatever the band: the merged ones,
        and where a convolution's sums do not depend on the band either (a CPU's) the picture, are the same to the bit.
        A power of two, so that half of an upsampled band is whole rows too."""
        rows = max(1, self.unit_bytes // (width * channels * self.itemsize))
        return int(2 ** (rows.bit_length() - 1))

    def rows(self, width: int, channels: int) -> int:
        unit = self.unit_rows(width, channels)
        wanted = self.band_bytes // (self.images * width * channels * self.itemsize)
        return unit * max(1, wanted // unit)

    def query_rows(self, positions: int) -> int:
        return max(1, self.scores_bytes // (self.images * positions * self.itemsize))


@dataclass(frozen=True)
class Footprint:
    """What one image needs at its fullest step, in bytes: the network's arithmetic, nothing measured."""

    stored: int  # whole pictures that cannot be banded away
    kept: int  # the same where the full size is recomputed
    attended: int  # the same during the attention, which is long over where the pictures are largest
    largest: int  # the largest single activation: a band can be no larger

    def peak(self, plan: Plan) -> int:
        return max(plan.images * self.whole(plan) + self.bands(plan), self.attention_peak(plan))

    def whole(self, plan: Plan) -> int:
        return self.kept if plan.recomputes else self.stored

    def bands(self, plan: Plan) -> int:
        count = RECOMPUTING_BANDS if plan.recomputes else WORKING_BANDS
        return count * min(plan.band_bytes, plan.images * self.largest)

    def attention_peak(self, plan: Plan) -> int:
        return plan.images * self.attended + plan.scores_bytes


class LayeredWeights(Protocol):
    """What of a network decides its footprint, an encoder's or a decoder's."""

    @property
    def conv_in(self) -> Conv: ...
    @property
    def steps(self) -> Sequence[Resnet | Attention | Upsample | Downsample]: ...
    @property
    def full_size(self) -> range: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def footprint(network: LayeredWeights, height: int, width: int) -> Footprint:
    """For an input of height x width: the decoder's latents, the encoder's pixels."""
    pixels, channels = height * width, network.conv_in.out_channels
    stored = kept = largest = pixels * channels
    attended = 0
    for index, step in enumerate(network.steps):
        recomputed = index in network.full_size
        match step:
            case Resnet():  # the input is freed as the hidden picture, and where there is a shortcut the output, grow
                before, channels = channels, step.conv1.out_channels
                needed, least = pixels * max(before, 2 * channels), pixels * channels
            case Attention():  # x, its normalised copy, keys, values
                attended = needed = least = pixels * 4 * channels
            case Upsample():
                least = pixels * channels
                pixels, channels = pixels * 4, step.conv.out_channels
                needed = pixels * channels
            case Downsample():
                needed = least = pixels * channels
                pixels, channels = pixels // 4, step.conv.out_channels
        stored, kept = max(stored, needed), max(kept, least if recomputed else needed)
        largest = max(largest, pixels * channels)
    itemsize = network.dtype.itemsize
    return Footprint(stored * itemsize, kept * itemsize, attended * itemsize, largest * itemsize)


def wanted(need: Footprint, batch: int, network: LayeredWeights) -> Plan:
    """The fastest plan, were there memory for it."""
    if network.device.type != "cpu":
        return Plan(batch, network.dtype.itemsize, batch * need.largest, SCORES_BYTES)
    images = max(1, min(batch, CPU_TOGETHER_BYTES // need.largest))
    return Plan(images, network.dtype.itemsize, CPU_BAND_BYTES, SCORES_BYTES)


def fit(need: Footprint, wanted: Plan, budget_bytes: int) -> Plan:
    """The wanted plan, with fewer images together, then lower bands, then recomputing, until its peak is in the budget.

    If even that is over it, it is returned all the same: the run may still fit, and none needs less.
    """
    plan = wanted
    while plan.images > 1 and need.peak(plan) > budget_bytes:
        plan = replace(plan, images=plan.images // 2)
    while need.attention_peak(plan) > budget_bytes and plan.scores_bytes > SMALLEST_SCORES_BYTES:
        plan = replace(plan, scores_bytes=plan.scores_bytes // 2)
    if need.peak(plan) > budget_bytes:
        plan = _lowered(need, plan, budget_bytes)
    if need.peak(plan) > budget_bytes:
        wanted_bytes = max(wanted.band_bytes, RECOMPUTED_BAND_BYTES)
        plan = _lowered(need, replace(plan, band_bytes=wanted_bytes, recomputes=True), budget_bytes)
    return plan


def _lowered(need: Footprint, plan: Plan, budget_bytes: int) -> Plan:
    count = RECOMPUTING_BANDS if plan.recomputes else WORKING_BANDS
    band_bytes = (budget_bytes - plan.images * need.whole(plan)) // count
    return replace(plan, band_bytes=max(SMALLEST_BAND_BYTES, min(band_bytes, plan.band_bytes)))
