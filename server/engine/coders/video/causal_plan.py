"""How to decode or encode a video within a memory budget.

A plan is a list of legs. A leg runs some stages on the whole video, chunk by chunk, and stores what they make for the
next leg; the last leg makes the sample, or the parameters of the posterior. A leg may also be computed in slabs of
rows, each with its halo: the rows around it that its output depends on.

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
from ..image.layers import Linear
from .causal_encoder_layers import (
    CausalDownsample,
    CausalEncoder,
    Contract,
    Downsample,
    EncoderBlock,
    EncoderStep,
    Fold,
    FrameAttention,
    Shrinking,
    space_shrinkage,
    time_shrinkage,
)
from .causal_layers import (
    Attention,
    CausalConv,
    CausalDecoder,
    CausalUpsample,
    Expand,
    NormedLinear,
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
    """A part of a plan: it runs stages [start, stop) on the whole video.

    slab_rows: latent rows computed at a time; None for all.
    frames: frames, counted at the input of the leg, computed at a time after the first one; None for the chunks of
        diffusers. In an encoder it is a multiple of the frames that become one latent frame.
    """

    start: int
    stop: int
    slab_rows: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Plan:
    """How to split one run. band_bytes: size of a band of rows. peak_bytes: memory in bytes, without the output."""

    legs: tuple[Leg, ...]
    band_bytes: int
    peak_bytes: int

    @property
    def slab_rows(self) -> int | None:
        """The latent rows that the last leg computes together; None for all."""
        return self.legs[-1].slab_rows


@dataclass(frozen=True)
class Grid:
    """An activation's size: frames per latent frame, rows per latent row, channels.

    is_single: the video has one frame, which stays one frame in all layers.
    """

    frames: int
    scale: int
    channels: int
    is_single: bool = False

    @property
    def pixels(self) -> int:
        """Its pixels per latent and frame."""
        return self.scale**2

    @property
    def values(self) -> int:
        """Its values per latent pixel."""
        return self.frames * self.pixels * self.channels

    def grown(self, times: int, side: int, channels: int) -> Grid:
        """Return the size with more frames and more rows and columns."""
        return Grid(self.frames * (1 if self.is_single else times), self.scale * side, channels, self.is_single)

    def shrunk(self, times: int, side: int, channels: int) -> Grid:
        """Return the size with fewer frames and fewer rows and columns."""
        return Grid(self.frames // (1 if self.is_single else times), self.scale // side, channels, self.is_single)


@dataclass(frozen=True)
class Need:
    """What a stage needs for each latent pixel. Memory is counted in values.

    grid: the size of its output.
    past: what its layers keep from earlier chunks, whatever the length of a chunk.
    held: the largest activations at one time, its input included, for each latent frame of a chunk.
    stored: its output, for each latent frame.
    work: multiplications, for each latent frame.
    seen: what its layers keep of every latent frame of the video.
    """

    grid: Grid
    past: int
    held: int
    stored: int
    work: int
    seen: int = 0


class Network:
    """The stages of a decoder or an encoder and what they need.

    is_single: for videos of one frame, which stays one frame in all layers.
    """

    def __init__(self, weights: CausalDecoder | CausalEncoder, *, is_single: bool = False) -> None:
        self.weights = weights
        self.is_single = is_single
        self.stages = stages_of(weights)
        self.entry = _entry(weights, is_single)
        self.needs = list(_needs(self.stages, self.entry))

    def for_frames(self, latent_frames: int) -> Network:
        """Return the network that counts what a video of this length needs."""
        return self._single if latent_frames == 1 and self.starts_single(1) else self

    @cached_property
    def _single(self) -> Network:
        return Network(self.weights, is_single=True)

    def starts_single(self, latent_frames: int) -> bool:
        """Return whether the first latent frame of a video of this length belongs to a single frame."""
        return isinstance(self.weights, CausalEncoder) or self.weights.starts_single(latent_frames)

    def longest_chunk(self, latent_frames: int, frames: int) -> float:
        """Return the length of diffusers' longest chunk of a video of this length, in latent frames.

        frames: those that a stage has of each latent frame. A first chunk that is longer than the others starts with a
            latent frame that has a single one, and counts as 1 / `frames`.
        """
        if isinstance(self.weights, CausalEncoder):
            return self.weights.longest_chunk(latent_frames, frames)
        chunk = self.weights.chunk
        return chunk if chunk == 1 or latent_frames % chunk == 0 else chunk + 1 / frames

    def is_one_chunk(self, latent_frames: int) -> bool:
        """Return whether a video of this length is computed all at once."""
        if self.is_divisible:
            return self.is_single
        weights = self.weights
        frames = weights.temporal_ratio() * (latent_frames - 1) + 1
        return len(weights.chunk_lengths(frames if isinstance(weights, CausalEncoder) else latent_frames)) == 1

    @cached_property
    def is_divisible(self) -> bool:
        """Whether any number of frames can be computed at a time.

        If not, a norm spans a frame or a chunk: its statistics are stored by the number of diffusers' chunk.
        """
        if isinstance(self.weights, CausalEncoder):
            return self.weights.chunks is None
        norms = [norm for stage in self.stages if (norm := span_norm(stage)) is not None]
        return self.weights.chunk == 1 and all(norm.span is Span.VIDEO for norm in norms)

    @cached_property
    def whole_frame_stages(self) -> list[int]:
        """The stages that need whole frames."""
        return [index for index, stage in enumerate(self.stages) if needs_whole_frames(stage)]

    @cached_property
    def scales(self) -> list[int]:
        """Rows per latent row before each stage, and after the last one."""
        return [self.entry.scale, *(need.grid.scale for need in self.needs)]

    @cached_property
    def frames(self) -> list[int]:
        """Frames per latent frame before each stage, and after the last one."""
        return [self.entry.frames, *(need.grid.frames for need in self.needs)]

    @cached_property
    def stored(self) -> list[int]:
        """Values stored before each stage, for each latent pixel of a latent frame."""
        return [self.entry.values, *(need.stored for need in self.needs)]

    def smallest_piece(self, start: int) -> int:
        """Return the fewest frames that can be computed at a time, after the first one: an encoder's latent frame."""
        return max(1, self.frames[start] // self.frames[-1])

    def halo_rows(self, start: int, stop: int) -> int:
        """Return the halo of stages [start, stop): latent rows above and below a slab that its output depends on."""
        rows = 0
        for stage in reversed(self.stages[start:stop]):
            rows = _reach(stage, rows)
        return -(-rows // self.scales[start])

    def norms(self, start: int, stop: int, *, in_slabs: bool) -> list[int]:
        """Return the stages whose statistics must be collected before a leg runs; its first stage has its own."""
        found = []
        for index in range(start + 1, stop):
            norm = span_norm(self.stages[index])
            if norm is not None and (in_slabs or norm.span is Span.VIDEO):
                found.append(index)
        return found


def _entry(weights: CausalDecoder | CausalEncoder, is_single: bool) -> Grid:
    """Return the size of the latents or pixels that enter."""
    if isinstance(weights, CausalEncoder):
        frames = 1 if is_single else weights.temporal_ratio()
        return Grid(frames, weights.spatial_ratio(), weights.pixel_channels, is_single)
    return Grid(1, 1, 1 if weights.post_quant is None else len(weights.post_quant.weight), is_single)


def _reach(stage: Stage, rows: int) -> int:
    """Return the halo of a stage's input, in rows, that `rows` rows of halo of its output need."""
    match stage:
        case Begin():
            return stage.patch * (rows + int(isinstance(stage.conv, CausalConv)))
        case End():
            return rows + int(isinstance(stage.conv, CausalConv))
        case Enter() | Leave():
            return rows + 1
        case Whole(block):
            for step in reversed(block.steps):
                rows = _reach_of_step(step, rows)
    return rows


def _reach_of_step(step: Step | EncoderStep, rows: int) -> int:
    match step:
        case Resnet():
            return rows + 2
        case Upsample() | CausalUpsample():
            return -(-(rows + 1) // 2)  # a 3x3 convolution after the nearest upsampling
        case Unfold():
            return -(-rows // 2) + 1  # a 3x3 convolution before the unfolding
        case Expand():
            return -(-rows // 2)
        case Downsample() | CausalDownsample() | Fold():
            return space_shrinkage(step) * rows + 1  # a 3x3 convolution and the halving
        case Contract():
            return 2 * rows
        case Attention() | FrameAttention():
            return rows


def _needs(stages: Sequence[Stage], grid: Grid) -> Iterator[Need]:
    for stage in stages:
        need = _need(stage, grid)
        yield need
        grid = need.grid


def _need(stage: Stage, grid: Grid) -> Need:
    before, area = grid.pixels * grid.channels, grid.pixels
    match stage:
        case Begin():
            return _need_of_begin(stage, grid)
        case Enter(resnet):
            to = resnet.conv1.out_channels
            residual = grid.channels if resnet.shortcut is None else to
            held = grid.frames * area * (grid.channels + to + (0 if resnet.shortcut is None else to))
            held += grid.values if isinstance(resnet.shortcut, NormedLinear) else 0
            work = grid.values * to * 27
            return Need(replace(grid, channels=to), 2 * before, held, grid.frames * area * (residual + to), work)
        case Leave(resnet):
            to = resnet.conv2.out_channels
            stored = grid.frames * area * to
            return Need(grid, 2 * area * to, 2 * stored, stored, stored * to * 27)
        case Whole(block):
            if isinstance(block, EncoderBlock):
                return _encoder_block_need(block, grid)
            return _block_need(list(_step_needs(block.steps, grid)), before if block.shortcut else 0, grid)
        case End():
            channels = out_channels(stage.conv) + stage.repeats_last
            made = grid.grown(1, stage.patch, channels // stage.patch**2)
            held = grid.frames * area * (grid.channels + 3 * channels)
            held += grid.values if isinstance(stage.conv, Linear) and stage.norm is not None else 0
            past = 0 if isinstance(stage.conv, Linear) else 2 * before
            return Need(made, past, held, grid.frames * area * channels, grid.values * channels * 27)


def _need_of_begin(stage: Begin, grid: Grid) -> Need:
    made = grid.shrunk(1, stage.patch, out_channels(stage.conv))
    entered = grid.values * (2 if stage.patch > 1 else 1)  # and the blocks of pixels
    past = 0 if isinstance(stage.conv, Linear) else 2 * max(made.channels, grid.pixels * grid.channels)
    held = entered + (2 if stage.repeats_input else 1) * made.values
    return Need(made, past, held, made.values, grid.values * made.channels * 27)


def _block_need(needs: Sequence[Need], entered: int, grid: Grid) -> Need:
    last = needs[-1]
    held = max(need.held for need in needs) + entered * grid.frames
    past, work, seen = (sum(values) for values in zip(*((n.past, n.work, n.seen) for n in needs), strict=True))
    return Need(last.grid, past, held, last.stored, work, seen)


def _encoder_block_need(block: EncoderBlock, grid: Grid) -> Need:
    need = _block_need(list(_step_needs(block.steps, grid)), 0, grid)
    if block.shortcut is None:
        return need
    first = block.steps[0]
    is_overwritten = isinstance(first, Resnet) and first.shortcut is None
    kept = need.stored + (0 if is_overwritten else grid.values)  # the caller keeps the block's input meanwhile
    return replace(need, held=need.held + kept)


def _step_needs(steps: Sequence[Step | EncoderStep], grid: Grid) -> Iterator[Need]:
    for step in steps:
        if isinstance(step, Resnet):
            need = _block_need(list(_needs((Enter(step), Leave(step)), grid)), 0, grid)
        elif isinstance(step, Shrinking):
            need = _shrinking(step, grid)
        else:
            need = _step(step, grid)
        yield need
        grid = need.grid


def _step(step: Attention | FrameAttention | Upsample | CausalUpsample | Unfold | Expand, grid: Grid) -> Need:
    area, entered = grid.pixels, grid.values
    if isinstance(step, Attention):
        seen = 2 * entered if step.sees_past else 0  # keys and values, which are copied to add a frame
        return Need(grid, 0, 5 * entered, entered, 4 * entered * grid.channels, 2 * seen)
    if isinstance(step, FrameAttention):
        # Keys and values of this chunk are among those that are remembered; the rest is a band at a time.
        return Need(grid, 0, entered, entered, 4 * entered * grid.channels, 2 * entered)
    made = grid.grown(time_growth(step), space_growth(step), step.out_channels)
    stored = made.values
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


def _shrinking(step: Shrinking, grid: Grid) -> Need:
    made = grid.shrunk(time_shrinkage(step), space_shrinkage(step), step.out_channels)
    entered, stored = grid.values, made.values
    match step:
        case Downsample():
            halved = (made if step.time is None else grid).frames * made.pixels * made.channels
            past = 0 if step.time is None else made.pixels * made.channels
            # Where time shrinks: the halved frames, the same side by side, and the output.
            held = entered + halved + (0 if step.time is None else (TAPS + 1) * stored)
            work = halved * grid.channels * 9 + (0 if step.time is None else stored * made.channels * TAPS)
        case CausalDownsample():
            past = (TAPS - step.times) * grid.pixels * grid.channels
            held, work = entered + stored, stored * grid.channels * 27
        case Fold():
            past = (TAPS - 1) * grid.pixels * grid.channels
            held, work = entered + 2 * stored, entered * step.conv.out_channels * 27
        case Contract():
            past, held, work = 0, entered + stored, entered * step.out_channels
    return Need(made, past, held, stored, work)


@dataclass(frozen=True)
class Size:
    """The size of one video, in latents."""

    frames: int
    height: int
    width: int


class Planner:
    """Finds the fastest plan for one size of latents within a budget.

    piece_bytes: the wanted size of the largest activation of the frames that are computed at a time.
    """

    def __init__(self, network: Network, size: Size, piece_bytes: int) -> None:
        self.network, self.size, self.piece_bytes = network.for_frames(size.frames), size, piece_bytes
        self.itemsize = network.weights.dtype.itemsize
        # The most latent frames of a chunk, by the frames that a stage has of each latent frame.
        self.longest_chunk = {
            frames: self.network.longest_chunk(size.frames, frames) for frames in set(self.network.frames)
        }

    def plan(self, budget_bytes: int, band_bytes: int) -> Plan:
        """Return the plan with the least work that fits; if none fits, the one that needs the least memory.

        budget_bytes: the limit of everything but the output. band_bytes: the largest useful band. If no plan fits, its
        `peak_bytes` exceeds the budget; the run may still succeed.
        """
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
                    found = min(found, self._longer(leg, best[leg.stop]), key=lambda way: (way[0], len(way[1])))
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
        """The stages before which activations may be stored.

        These are both ends, the borders of stages that need whole frames, and norms with spans.
        """
        stages = self.network.stages
        norms = {i for i, stage in enumerate(stages) if span_norm(stage) is not None}
        borders = {border for whole in self.network.whole_frame_stages for border in (whole, whole + 1)}
        return sorted({0, len(stages)} | norms | borders)

    def legs_from(self, start: int) -> Iterator[Leg]:
        """Yield the legs that begin with a stage."""
        for stop in self.nodes:
            if stop > start:
                yield self.leg(start, stop)
                if not any(start <= whole < stop for whole in self.network.whole_frame_stages):
                    yield from (self.leg(start, stop, rows) for rows in SLABS if rows < self.size.height)

    def leg_work(self, leg: Leg) -> float:
        """Return the multiplications of a leg for each latent pixel and frame, those for statistics included."""
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
        """Return the bytes that a leg needs: stored activations, the frames that layers remember, and one chunk."""
        network, size = self.network, self.size
        row = size.width * self.itemsize
        entering = 0 if leg.start == 0 else network.stored[leg.start]
        leaving = 0 if leg.stop == len(network.stages) else network.stored[leg.stop]
        # Whole frames that enter are freed one after the other, while those that leave are stored.
        stored = max(entering, leaving) if leg.slab_rows is None else entering + leaving
        needs = network.needs[leg.start : leg.stop]
        # The layer that runs holds the frames that it remembers, and those that it will remember.
        past = sum(need.past + size.frames * need.seen for need in needs) + max(need.past for need in needs)
        past = 0 if network.is_one_chunk(size.frames) else past  # nothing is kept after the last chunk
        values = past + max(self.latent_frames(leg, need) * need.held for need in needs)
        return int(row * (stored * size.frames * size.height + values * self.slab_with_halo(leg)))

    def leg(self, start: int, stop: int, slab_rows: int | None = None) -> Leg:
        """Return a leg that computes as many frames at a time as give the wanted size."""
        leg = Leg(start, stop, slab_rows)
        if not self.network.is_divisible:
            return leg
        largest = max(need.stored for need in self.network.needs[start:stop]) / self.network.frames[start]
        smallest = self.network.smallest_piece(start)
        piece_bytes = smallest * largest * self.slab_with_halo(leg) * self.size.width * self.itemsize
        return replace(leg, frames=smallest * max(1, int(self.piece_bytes // piece_bytes)))

    def latent_frames(self, leg: Leg, need: Need) -> float:
        """Return how many latent frames a stage of a leg computes at a time, at most."""
        if leg.frames is None:
            return self.longest_chunk[need.grid.frames]
        return min(leg.frames / self.network.frames[leg.start], self.size.frames)
