"""Plans that fit the memory: how many rows a band has, and how many images are computed together.

A band is a group of consecutive rows of an activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ...kernels.reference import SCORE_BYTES
from .layers import Attention, Conv, Downsample, Resnet, Upsample

# Bands of this size stay in a CPU's caches from the norm through the convolution to the statistics. On two cores an
# image of 512² takes 0.7 of the time that it takes as one band. Twice the size is no faster and takes 100 MB more at
# 1024².
CPU_BAND_BYTES = 4 << 20
# The largest band on a GPU. cuDNN is not to be relied on beyond 2^31 values, and higher bands are hardly faster.
GPU_BAND_BYTES = 1 << 30
# Small images are computed together, so that the weights are read from memory once for all of them. Eight images of
# 64x64 pixels take 0.55 of the time that they take one by one, eight of 128x128 pixels 0.85.
CPU_TOGETHER_BYTES = 16 << 20
# The size of one chunk of the attention's scores.
SCORES_BYTES = 256 << 20

# The most bands that a layer holds besides the stored activations: the input with its halo, the convolution's output,
# and for an upsample its phases (quarters of a band that are interleaved into one) with the interleaved result.
WORKING_BANDS = 4
# The most bands while recomputing: each layer that is computed again holds one more.
RECOMPUTING_BANDS = 6
SMALLEST_BAND_BYTES = 1 << 20
# The halo of a band is recomputed together with the band, so bands of few rows cost time: 8 MB was the fastest on a
# CPU.
RECOMPUTED_BAND_BYTES = 8 << 20
SMALLEST_SCORES_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    """How to split one run.

    images: how many images are computed together.
    itemsize: bytes of one value of an activation.
    band_bytes: the largest size of one band of an activation, of all `images` together.
    scores_bytes: the largest size of one chunk of the attention's scores, of all `images` together.
    unit_bytes: the largest size of one unit of rows, of one image (see `unit_rows`).
    recomputes: whether steps at the size of the whole image store only their output, and compute their inner
        activations again whenever these are read.
    """

    images: int
    itemsize: int
    band_bytes: int
    scores_bytes: int
    unit_bytes: int = SMALLEST_BAND_BYTES
    recomputes: bool = False

    def unit_rows(self, width: int, channels: int) -> int:
        """Return how many rows of an activation form a unit. A band consists of whole units.

        The CPU kernels take the statistics of each unit separately. The merged statistics are therefore bit-identical
        for every band height, and so is the image, because the sums of a CPU's convolution do not depend on the band
        either. The other kernels ignore units.

        The result is a power of two, so that a band of an upsampled activation comes from a whole number of input rows.
        """
        rows = max(1, self.unit_bytes // (width * channels * self.itemsize))
        return int(2 ** (rows.bit_length() - 1))

    def rows(self, width: int, channels: int) -> int:
        """Return how many rows a band of an activation of this width has: as many units as fit, but at least one."""
        unit = self.unit_rows(width, channels)
        wanted = self.band_bytes // (self.images * width * channels * self.itemsize)
        return unit * max(1, wanted // unit)

    def query_rows(self, positions: int) -> int:
        """Return how many queries of an attention over this many positions are computed at a time, at least one."""
        return max(1, self.scores_bytes // (self.images * positions * SCORE_BYTES))


@dataclass(frozen=True)
class Footprint:
    """The memory that one image needs, in bytes, calculated from the sizes of the network's layers.

    stored: whole activations stored at the step that stores most, if nothing is recomputed.
    kept: the same if the steps at the full size are recomputed.
    attended: whole activations stored during the attention, which runs at the resolution of the latents.
    largest: the largest single activation; no band is larger.
    """

    stored: int
    kept: int
    attended: int
    largest: int

    def peak(self, plan: Plan) -> int:
        """Return the peak memory of a run with this plan."""
        return max(plan.images * self.whole(plan) + self.bands(plan), self.attention_peak(plan))

    def whole(self, plan: Plan) -> int:
        """Return the size of the whole activations that one image stores."""
        return self.kept if plan.recomputes else self.stored

    def bands(self, plan: Plan) -> int:
        """Return the size of the bands that a layer holds beside the whole activations."""
        count = RECOMPUTING_BANDS if plan.recomputes else WORKING_BANDS
        return count * min(plan.band_bytes, plan.images * self.largest)

    def attention_peak(self, plan: Plan) -> int:
        """Return the peak memory during the attention."""
        return plan.images * self.attended + plan.scores_bytes


class LayeredWeights(Protocol):
    """The attributes of `DecoderWeights` and `EncoderWeights` from which the footprint is calculated."""

    @property
    def conv_in(self) -> Conv:
        """The first convolution."""
        ...

    @property
    def steps(self) -> Sequence[Resnet | Attention | Upsample | Downsample]:
        """The steps after it, in order."""
        ...

    @property
    def full_size(self) -> range:
        """The indices of the steps that can be recomputed."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        ...


def footprint(network: LayeredWeights, height: int, width: int) -> Footprint:
    """Calculate the footprint for an input of height x width: latents for a decoder, pixels for an encoder."""
    pixels, channels = height * width, network.conv_in.out_channels
    stored = kept = largest = pixels * channels
    attended = 0
    for index, step in enumerate(network.steps):
        recomputed = index in network.full_size
        match step:
            case Resnet():  # conv1's output and the residual, which is the input, or grows while the input is freed
                before, channels = channels, step.conv1.out_channels
                needed, least = pixels * max(before, 2 * channels), pixels * channels
            case Attention():  # x, its normalized copy, the keys and the values
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
    """Return the fastest plan, whatever memory it needs. batch: how many images the run has."""
    if network.device.type != "cpu":
        return Plan(batch, network.dtype.itemsize, min(batch * need.largest, GPU_BAND_BYTES), SCORES_BYTES)
    images = max(1, min(batch, CPU_TOGETHER_BYTES // need.largest))
    return Plan(images, network.dtype.itemsize, CPU_BAND_BYTES, SCORES_BYTES)


def fit(need: Footprint, wanted: Plan, budget_bytes: int) -> Plan:
    """Reduce the wanted plan until its peak fits the budget.

    The measures, in this order, each only if the ones before did not suffice: fewer images together, smaller chunks of
    attention scores, lower bands, recomputing. If all of them together do not suffice, the smallest plan is returned
    all the same, because the estimate may be too high.
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
    """Return the plan with the highest bands that fit the budget, between SMALLEST_BAND_BYTES and its own.

    Bands that are lower than wanted have a power of two of bytes, so that budgets that differ a little give one plan,
    which a CUDA graph may be recorded for.
    """
    count = RECOMPUTING_BANDS if plan.recomputes else WORKING_BANDS
    room = max(1, (budget_bytes - plan.images * need.whole(plan)) // count)
    band_bytes = plan.band_bytes if room >= plan.band_bytes else 1 << (room.bit_length() - 1)
    return replace(plan, band_bytes=max(SMALLEST_BAND_BYTES, band_bytes))
