"""How to decode a video within a memory budget.

A plan is a list of legs. A leg runs some stages on the whole video, chunk by chunk, and stores what they make for the
next leg; the last leg makes the sample. A leg may also be computed in slabs of rows, each with some rows around it.

Statistics that are not known when a leg starts are collected first: for each such norm, the stages before it run once
more and their output is thrown away. A short leg therefore saves time and a long leg saves memory, because only the
activations between two legs are stored as a whole. Among all plans that fit the budget, the fastest one is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

from ...kernels.causal_kernels import TAPS
from .causal_layers import (
    Attention,
    CausalConv,
    CausalDecoder,
    CausalUpsample,
    Expand,
    Resnet,
    Span,
    Step,
    Unfold,
    Upsample,
    out_channels,
    space_growth,
    time_growth,
)
from .causal_stages import Begin, End, Enter, Leave, Stage, Whole, needs_whole_frames, span_norm, stages_of

# The bands that a causal convolution holds: the window, the same three times side by side, the normalized rows in
# float32 (two), and its output, with one to spare.
WORKING_BANDS = 8
SMALLEST_BAND = 8  # the smallest band is this many times smaller than the wanted one
SMALLEST_SLAB = 4  # latent rows; with fewer, the rows around them cost more time than they save memory
SLABS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # the heights of slabs that are considered, in latent rows


@dataclass(frozen=True)
class Leg:
    """Stages [start, stop).

    slab_rows: how many latent rows are computed together; None for all.
    frames: how many of the frames that enter are computed together, after the first one; None for the decoder's chunks.
    """

    start: int
    stop: int
    slab_rows: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Plan:
    """How to split one decode. band_bytes: size of a band of rows. peak_bytes: the memory beside the output."""

    legs: tuple[Leg, ...]
    band_bytes: int
    peak_bytes: int

    @property
    def slab_rows(self) -> int | None:
        """The latent rows that the last leg computes together; None for all."""
        return self.legs[-1].slab_rows


@dataclass(frozen=True)
class Grid:
    """An activation's size: frames per latent frame, rows per latent row, channels."""

    frames: int
    scale: int
    channels: int

    @property
    def pixels(self) -> int:
        """Its pixels per latent and frame."""
        return self.scale**2


@dataclass(frozen=True)
class Need:
    """What a stage takes, for each latent pixel of a latent frame. Memory is counted in values.

    past: what its layers remember of earlier chunks, whatever the length of a chunk.
    seen: what its layers remember of each latent frame of the video.
    held: the largest activations at one time, those that enter included, for each latent frame of a chunk.
    stored: the activations after it.
    work: multiplications.
    """

    grid: Grid
    past: int
    held: int
    stored: int
    work: int
    seen: int = 0


class Network:
    """The stages of a decoder and what they need."""

    def __init__(self, decoder: CausalDecoder) -> None:
        self.decoder = decoder
        self.stages = stages_of(decoder)
        self.needs = list(_needs(self.stages))

    @cached_property
    def is_divisible(self) -> bool:
        """Whether any number of frames can be computed at a time, because no norm spans those of a chunk."""
        norms = [norm for stage in self.stages if (norm := span_norm(stage)) is not None]
        return self.decoder.chunk == 1 and all(norm.span is Span.VIDEO for norm in norms)

    @cached_property
    def whole_until(self) -> int:
        """How many stages, from the first on, need whole frames."""
        return max((i + 1 for i, stage in enumerate(self.stages) if needs_whole_frames(stage)), default=0)

    @cached_property
    def scales(self) -> list[int]:
        """Rows per latent row before each stage, and after the last one."""
        return [1, *(need.grid.scale for need in self.needs)]

    @cached_property
    def frames(self) -> list[int]:
        """Frames per latent frame before each stage, and after the last one."""
        return [1, *(need.grid.frames for need in self.needs)]

    @cached_property
    def stored(self) -> list[int]:
        """Values stored before each stage, for each latent pixel of a latent frame."""
        return [out_of_latents(self.decoder), *(need.stored for need in self.needs)]

    def halo_rows(self, start: int, stop: int) -> int:
        """Return how many latent rows above and below a slab have an influence on what stages [start, stop) make."""
        rows = 0
        for stage in reversed(self.stages[start:stop]):
            rows = _reach(stage, rows)
        return -(-rows // self.scales[start])

    def norms(self, start: int, stop: int, *, in_slabs: bool) -> list[int]:
        """Return the stages inside a leg whose statistics must be collected before it runs."""
        found = []
        for index in range(start + 1, stop):
            norm = span_norm(self.stages[index])
            if norm is not None and (in_slabs or norm.span is Span.VIDEO):
                found.append(index)
        return found


def out_of_latents(decoder: CausalDecoder) -> int:
    """Return the channels of the latents."""
    return 1 if decoder.post_quant is None else len(decoder.post_quant.weight)


def _reach(stage: Stage, rows: int) -> int:
    """Return how many rows around a slab a stage reads to make some rows around the slab of its output."""
    match stage:
        case Begin() | End():
            return rows + int(isinstance(stage.conv, CausalConv))
        case Enter() | Leave():
            return rows + 1
        case Whole(block):
            for step in reversed(block.steps):
                match step:
                    case Resnet():
                        rows += 2
                    case Upsample() | CausalUpsample():
                        rows = -(-(rows + 1) // 2)  # a 3x3 convolution after the nearest upsampling
                    case Unfold():
                        rows = -(-rows // 2) + 1  # a 3x3 convolution before the unfolding
                    case Expand():
                        rows = -(-rows // 2)
                    case Attention():
                        pass
    return rows


def _needs(stages: Sequence[Stage]) -> Iterator[Need]:
    grid = Grid(1, 1, 0)
    for stage in stages:
        need = _need(stage, grid)
        yield need
        grid = need.grid


def _need(stage: Stage, grid: Grid) -> Need:
    before, area = grid.pixels * grid.channels, grid.pixels
    match stage:
        case Begin():
            made = Grid(1, 1, out_channels(stage.conv))
            return Need(made, past=2 * made.channels, held=2 * made.channels, stored=made.channels, work=0)
        case Enter(resnet):
            to = resnet.conv1.out_channels
            residual = grid.channels if resnet.shortcut is None else to
            held = grid.frames * area * (grid.channels + to + (0 if resnet.shortcut is None else to))
            work = grid.frames * area * grid.channels * to * 27
            made = Grid(grid.frames, grid.scale, to)
            return Need(made, 2 * before, held, grid.frames * area * (residual + to), work)
        case Leave(resnet):
            to = resnet.conv2.out_channels
            stored = grid.frames * area * to
            return Need(grid, 2 * area * to, 2 * stored, stored, stored * to * 27)
        case Whole(block):
            return _block_need(list(_step_needs(block.steps, grid)), before if block.shortcut else 0, grid)
        case End():
            channels = out_channels(stage.conv)
            made = Grid(grid.frames, grid.scale * stage.patch, channels // stage.patch**2)
            held = grid.frames * area * (grid.channels + 3 * channels)
            work = grid.frames * area * grid.channels * channels * 27
            return Need(made, 2 * before, held, grid.frames * area * channels, work)


def _block_need(needs: Sequence[Need], entered: int, grid: Grid) -> Need:
    last = needs[-1]
    held = max(need.held for need in needs) + entered * grid.frames
    past, work, seen = (sum(values) for values in zip(*((n.past, n.work, n.seen) for n in needs), strict=True))
    return Need(last.grid, past, held, last.stored, work, seen)


def _step_needs(steps: Sequence[Step], grid: Grid) -> Iterator[Need]:
    for step in steps:
        need = (
            _block_need(list(_needs_of_halves(step, grid)), 0, grid) if isinstance(step, Resnet) else _step(step, grid)
        )
        yield need
        grid = need.grid


def _needs_of_halves(resnet: Resnet, grid: Grid) -> Iterator[Need]:
    enter = _need(Enter(resnet), grid)
    yield enter
    yield _need(Leave(resnet), enter.grid)


def _step(step: Step, grid: Grid) -> Need:
    area, frames = grid.pixels, grid.frames
    entered = frames * area * grid.channels
    if isinstance(step, Attention):
        seen = 2 * entered if step.sees_past else 0  # keys and values, which are copied to add a frame
        return Need(grid, 0, 5 * entered, entered, 4 * entered * grid.channels, 2 * seen)
    assert isinstance(step, Upsample | CausalUpsample | Unfold | Expand)
    made = Grid(frames * time_growth(step), grid.scale * space_growth(step), step.out_channels)
    stored = made.frames * made.pixels * made.channels
    past = TAPS - 1
    match step:
        case Upsample():
            past = 0 if step.time is None else past
            widened = entered * (1 + 2 * TAPS) if step.time is not None else entered
            held = max(widened, entered * (1 if step.time is None else 2) + stored * (2 if step.repeats else 1))
            work = stored * grid.channels * 4 // (2 if step.repeats else 1)
        case CausalUpsample():
            past = step.taps - 1
            held = entered + stored * (1 if step.after is None else 2)
            work = stored * grid.channels * 4 * step.taps // (1 if step.after is None else 2)
        case Unfold():
            held = entered + 3 * stored
            work = stored * grid.channels * 27
        case Expand():
            past = 0
            held, work = entered + 2 * stored, stored * grid.channels
    return Need(made, past * area * grid.channels, held, stored, work)


@dataclass(frozen=True)
class Size:
    """The size of one decode, in latents."""

    frames: int
    height: int
    width: int


class Planner:
    """Finds the fastest plan for one size of latents within a budget.

    piece_bytes: the wanted size of the largest activation of the frames that are computed at a time.
    """

    def __init__(self, network: Network, size: Size, piece_bytes: int) -> None:
        self.network, self.size, self.piece_bytes = network, size, piece_bytes
        self.itemsize = network.decoder.dtype.itemsize

    def plan(self, budget_bytes: int, band_bytes: int) -> Plan:
        """Return the fastest plan that fits; if none fits, the smallest one, because the run may still succeed."""
        smallest = band_bytes // SMALLEST_BAND
        room = budget_bytes - WORKING_BANDS * smallest
        legs = self.ideal
        if max(self.leg_bytes(leg) for leg in legs) > room:
            legs = self.fastest(room) or self.fastest(self.smallest_peak())
        peak = max(self.leg_bytes(leg) for leg in legs)
        bands = max(smallest, min(band_bytes, (budget_bytes - peak) // WORKING_BANDS))
        return Plan(legs, bands, peak + WORKING_BANDS * bands)

    @property
    def ideal(self) -> tuple[Leg, ...]:
        """The legs that compute every stage once, on whole frames."""
        ends = [0, *self.network.norms(0, len(self.network.stages), in_slabs=False), len(self.network.stages)]
        return tuple(self.leg(start, stop) for start, stop in pairwise(ends))

    def fastest(self, room: int) -> tuple[Leg, ...]:
        """Return the legs of the fastest plan whose memory is at most `room`; none if there is no such plan."""
        nodes = self.nodes
        best: dict[int, tuple[float, tuple[Leg, ...]]] = {nodes[-1]: (0, ())}
        for start in reversed(nodes[:-1]):
            found: tuple[float, tuple[Leg, ...]] = (inf, ())
            for leg in self.legs_from(start):
                if leg.stop in best and self.leg_bytes(leg) <= room:
                    found = min(found, self._longer(leg, best[leg.stop]), key=lambda way: way[0])
            if found[1]:
                best[start] = found
        return best[0][1] if 0 in best else ()

    def _longer(self, leg: Leg, rest: tuple[float, tuple[Leg, ...]]) -> tuple[float, tuple[Leg, ...]]:
        return self.leg_work(leg) + rest[0], (leg, *rest[1])

    def smallest_peak(self) -> int:
        """Return the memory of the plan that needs least."""
        nodes = self.nodes
        least: dict[int, int] = {nodes[-1]: 0}
        for start in reversed(nodes[:-1]):
            least[start] = min(max(self.leg_bytes(leg), least[leg.stop]) for leg in self.legs_from(start))
        return least[0]

    @cached_property
    def nodes(self) -> list[int]:
        """The stages before which activations may be stored: both ends, the last attention, and norms with spans."""
        stages = self.network.stages
        inner = {i for i, stage in enumerate(stages) if i and span_norm(stage) is not None}
        return sorted({0, len(stages), self.network.whole_until} | inner)

    def legs_from(self, start: int) -> Iterator[Leg]:
        """Yield the legs that begin with a stage."""
        for stop in self.nodes:
            if stop > start:
                yield self.leg(start, stop)
                if start >= self.network.whole_until:
                    yield from (self.leg(start, stop, rows) for rows in SLABS if rows < self.size.height)

    def leg_work(self, leg: Leg) -> float:
        """Return the multiplications of a leg, the passes that collect statistics included."""
        done = [0, *accumulate(need.work for need in self.network.needs[leg.start : leg.stop])]
        in_slabs = leg.slab_rows is not None
        passes = [index - leg.start for index in self.network.norms(leg.start, leg.stop, in_slabs=in_slabs)]
        rows = 1.0 if leg.slab_rows is None else self.slab_with_halo(leg) / min(leg.slab_rows, self.size.height)
        return rows * sum(done[stop] for stop in (*passes, leg.stop - leg.start))

    def slab_with_halo(self, leg: Leg) -> int:
        """Return the largest number of latent rows that are computed at a time."""
        if leg.slab_rows is None:
            return self.size.height
        return min(self.size.height, leg.slab_rows + 2 * self.network.halo_rows(leg.start, leg.stop))

    def leg_bytes(self, leg: Leg) -> int:
        """Return the memory of a leg: what is stored before and after it, what layers remember, and one chunk."""
        network, size = self.network, self.size
        row = size.width * self.itemsize
        entering = 0 if leg.start == 0 else network.stored[leg.start]
        leaving = 0 if leg.stop == len(network.stages) else network.stored[leg.stop]
        # Whole frames that enter are freed one after the other, while those that leave are stored.
        stored = max(entering, leaving) if leg.slab_rows is None else entering + leaving
        needs = network.needs[leg.start : leg.stop]
        # The layer that runs holds the frames that it remembers, and those that it will remember.
        past = sum(need.past + size.frames * need.seen for need in needs) + max(need.past for need in needs)
        values = past + max(self.latent_frames(leg, need) * need.held for need in needs)
        return int(row * (stored * size.frames * size.height + values * self.slab_with_halo(leg)))

    def leg(self, start: int, stop: int, slab_rows: int | None = None) -> Leg:
        """Return a leg that computes as many frames at a time as give the wanted size."""
        leg = Leg(start, stop, slab_rows)
        if not self.network.is_divisible:
            return leg
        largest = max(need.stored for need in self.network.needs[start:stop]) / self.network.frames[start]
        frame_bytes = largest * self.slab_with_halo(leg) * self.size.width * self.itemsize
        return replace(leg, frames=max(1, int(self.piece_bytes // frame_bytes)))

    def latent_frames(self, leg: Leg, need: Need) -> float:
        """Return how many latent frames a stage of a leg computes at a time, at most."""
        chunk, entering = self.network.decoder.chunk, self.network.frames[leg.start]
        if leg.frames is not None:
            return min(leg.frames / entering, self.size.frames)
        if chunk == 1 or self.size.frames % chunk == 0:
            return chunk
        return chunk + 1 / need.grid.frames  # the first chunk has one latent frame more, which becomes a single frame
