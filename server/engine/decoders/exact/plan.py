"""How tall the bands are and how many images go together, from the memory there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.engine.decoders.exact.network import Attention, Network, Resnet, Upsample

# Beside the stored pictures a pass holds a band with its halo, the convolution's output and its four phases.
WORKING_BANDS = 4
SMALLEST_BAND_BYTES = 1 << 20
SMALLEST_SCORES_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    images: int  # decoded together
    itemsize: int
    band_bytes: int  # one band of an activation
    scores_bytes: int  # one chunk of the attention's scores
    unit_bytes: int = SMALLEST_BAND_BYTES

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
    attended: int  # the same during the attention, which is long over where the pictures are largest
    largest: int  # the largest single activation: a band can be no larger

    def peak(self, plan: Plan) -> int:
        banded = plan.images * self.stored + WORKING_BANDS * min(plan.band_bytes, plan.images * self.largest)
        return max(banded, self.attention_peak(plan))

    def attention_peak(self, plan: Plan) -> int:
        return plan.images * self.attended + plan.scores_bytes


def footprint(network: Network, height: int, width: int) -> Footprint:
    """For a latent of height x width."""
    pixels, channels = height * width, network.conv_in.out_channels
    stored = largest = pixels * channels
    attended = 0
    for step in network.steps:
        match step:
            case Resnet():  # the input is freed as the hidden picture, and where there is a shortcut the output, grow
                before, channels = channels, step.conv1.out_channels
                needed = pixels * max(before, 2 * channels)
            case Attention():  # x, its normalised copy, keys, values
                attended = needed = pixels * 4 * channels
            case Upsample():
                pixels, channels = pixels * 4, step.conv.out_channels
                needed = pixels * channels
        stored, largest = max(stored, needed), max(largest, pixels * channels)
    itemsize = network.dtype.itemsize
    return Footprint(stored * itemsize, attended * itemsize, largest * itemsize)


def fit(need: Footprint, wanted: Plan, budget_bytes: int) -> Plan:
    """The wanted plan, with fewer images together and then lower bands until its peak is within the budget.

    If even the lowest bands are over it they are returned all the same: the decode may still fit, and none needs less.
    """
    plan = wanted
    while plan.images > 1 and need.peak(plan) > budget_bytes:
        plan = replace(plan, images=plan.images // 2)
    while need.attention_peak(plan) > budget_bytes and plan.scores_bytes > SMALLEST_SCORES_BYTES:
        plan = replace(plan, scores_bytes=plan.scores_bytes // 2)
    if need.peak(plan) > budget_bytes:
        band_bytes = (budget_bytes - plan.images * need.stored) // WORKING_BANDS
        plan = replace(plan, band_bytes=max(SMALLEST_BAND_BYTES, min(band_bytes, plan.band_bytes)))
    return plan
