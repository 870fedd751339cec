"""Runs a causal decoder or encoder on one video, leg by leg of a plan, and each leg piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .causal_encoder_layers import EncoderBlock
from .causal_encoding import encoder_block
from .causal_passes import Run, VideoPast, begin, end, enter_resnet, leave_resnet, whole_block
from .causal_plan import Leg, Network
from .causal_stages import Begin, End, Enter, Leave, Stage, State, Whole, norm_input, span_norm
from .causal_statistics import Place, Statistics

Write = Callable[[int, int, Tensor], None]
"""`write(frame, top, rows)` receives finished rows `[n, r, W, C]` of the output.

frame, top: the numbers of their first frame and of their first row.
"""


class Piece(NamedTuple):
    """Some frames between two legs: where they are, and the activations."""

    place: Place
    state: State


@dataclass(frozen=True)
class Slab:
    """Latent rows [top, bottom) of a video, and [above, below): the same with their halo."""

    top: int
    bottom: int
    above: int
    below: int

    def inner(self, x: Tensor, scale: int) -> Tensor:  # [n, scale (below - above), W, C]
        """Return the slab's own rows of an activation that also has those around them. scale: its rows per latent."""
        return x[:, scale * (self.top - self.above) : scale * (self.bottom - self.above)]

    def own(self, x: Tensor, scale: int) -> Tensor:  # [n, scale h, W, C]
        """Return the slab's own rows of an activation that has all rows."""
        return x[:, scale * self.top : scale * self.bottom]

    def around(self, x: Tensor, scale: int) -> Tensor:  # [n, scale h, W, C]
        """Return the rows of the slab and around it of an activation that has all rows."""
        return x[:, scale * self.above : scale * self.below]


Take = Callable[[Piece, Slab, int], None]
"""`take(piece, slab, frame)` receives the output of a leg for some frames. frame: the number of the first one."""


class VideoRun:
    """The decode or encode of one video, leg by leg.

    pieces: the activations that are stored between two legs, from the first frame to the last; at first the latents or
        pixels, which may be in any dtype and on any device.
    """

    def __init__(self, network: Network, run: Run, pieces: list[Piece], write: Write) -> None:
        self.network, self.run, self.pieces, self.write = network, run, pieces, write
        self.statistics = Statistics(run.kernels.planar)
        self.height = pieces[0].state.x.shape[1] // network.scales[0]

    def run_leg(self, leg: Leg) -> None:
        """Run a leg: collect the statistics that it needs, then store what it makes, or write the output."""
        network, in_slabs = self.network, leg.slab_rows is not None
        for stop in network.norms(leg.start, leg.stop, in_slabs=in_slabs):
            self._pass(replace(leg, stop=stop), partial(self._collect, stop))
            self._settle(stop)
        stored: dict[int, Piece] = {}
        if leg.stop == len(network.stages):
            self._pass(leg, self._finish, consumes=not in_slabs)
        else:
            store = self._store_rows if in_slabs else self._store
            self._pass(leg, partial(store, leg.stop, stored), consumes=not in_slabs)
            self._settle(leg.stop)
        self.pieces = list(stored.values())

    def _pass(self, leg: Leg, take: Take, *, consumes: bool = False) -> None:
        """Run the stages of a leg on the whole video. consumes: the activations stored before it are not kept."""
        stages = self.network.stages[leg.start : leg.stop]
        for slab in self._slabs(leg):
            past, frame = VideoPast(self.statistics, self.pieces[0].place), 0
            for piece, past.is_last in self._entering(leg, slab, consumes=consumes):
                place, state = piece
                past.place = place if place.latents is None else replace(place, latents=slab.around(place.latents, 1))
                del piece  # so that its memory is freed while the stages run
                for stage in stages:
                    state = advance(stage, self.run, past, state)
                take(Piece(place, state), slab, frame)
                frame += len(state.x)

    def _slabs(self, leg: Leg) -> Iterator[Slab]:
        if leg.slab_rows is None:
            yield Slab(0, self.height, 0, self.height)
            return
        halo = self.network.halo_rows(leg.start, leg.stop)
        for top in range(0, self.height, leg.slab_rows):
            bottom = min(top + leg.slab_rows, self.height)
            yield Slab(top, bottom, max(top - halo, 0), min(bottom + halo, self.height))

    def _entering(self, leg: Leg, slab: Slab, *, consumes: bool) -> Iterator[tuple[Piece, bool]]:
        """Yield the input of a leg, as many frames at a time as it computes, and whether it is the last piece.

        All stages but 0 may overwrite it.
        """
        pieces = self.pieces if consumes else list(self.pieces)
        pieces.reverse()
        while pieces:
            parts = list(_split(pieces.pop(), leg.frames))
            parts.reverse()
            while parts:  # no variable here keeps a part alive while the stages run
                is_last = not pieces and len(parts) == 1
                is_given = consumes and leg.start > 0
                yield parts.pop() if is_given else self._copied(leg, slab, parts.pop()), is_last

    def _copied(self, leg: Leg, slab: Slab, piece: Piece) -> Piece:
        return Piece(piece.place, piece.state.map(partial(self._rows, leg, slab)))

    def _rows(self, leg: Leg, slab: Slab, x: Tensor) -> Tensor:  # [n, s h, W, C] -> [n, s (below - above), W, C]
        """Return the rows of a slab with its halo: converted for stage 0, which does not change them, else a copy."""
        rows = slab.around(x, self.network.scales[leg.start])
        if leg.start > 0:
            return rows.clone()
        return rows.to(self.network.weights.device, self.network.weights.dtype).contiguous()

    def _collect(self, stop: int, piece: Piece, slab: Slab, _frame: int) -> None:
        """Note the statistics of the norm with which a stage begins, if it has one."""
        stage = self.network.stages[stop]
        norm = span_norm(stage)
        if norm is not None:
            x = norm_input(stage, piece.state)  # [n, H, W, C]
            self.statistics.collect(norm, piece.place, slab.inner(x, self.network.scales[stop]))

    def _settle(self, stop: int) -> None:
        norm = span_norm(self.network.stages[stop])
        if norm is not None:
            self.statistics.settle(norm)

    def _store(self, stop: int, stored: dict[int, Piece], piece: Piece, slab: Slab, frame: int) -> None:
        """Store whole frames for the next leg."""
        self._collect(stop, piece, slab, frame)
        stored[frame] = piece

    def _store_rows(self, stop: int, stored: dict[int, Piece], piece: Piece, slab: Slab, frame: int) -> None:
        """Store the rows of a slab for the next leg."""
        self._collect(stop, piece, slab, frame)
        scale = self.network.scales[stop]
        if frame not in stored:
            stored[frame] = Piece(piece.place, piece.state.map(partial(_with_rows, rows=scale * self.height)))
        for whole, x in zip(stored[frame].state, piece.state, strict=True):
            if whole is not None and x is not None:
                slab.own(whole, scale).copy_(slab.inner(x, scale))

    def _finish(self, piece: Piece, slab: Slab, frame: int) -> None:
        """Write finished rows of the output."""
        scale = self.network.scales[-1]
        self.write(frame, scale * slab.top, slab.inner(piece.state.x, scale))


def advance(stage: Stage, run: Run, past: VideoPast, state: State) -> State:
    """Run one stage on the next frames. The tensors of `state` are overwritten, except by the first stage."""
    x, hidden = state
    match stage:
        case Begin():
            return State(begin(stage, run, past, x))
        case Enter(resnet):
            return enter_resnet(resnet, run, past, x)
        case Leave(resnet):
            assert hidden is not None
            return State(leave_resnet(resnet, run, past, x, hidden))
        case Whole(block):
            if isinstance(block, EncoderBlock):
                return State(encoder_block(block, run, past, x))
            return State(whole_block(block, run, past, x))
        case End():
            return State(end(stage, run, past, x))


def _split(piece: Piece, frames: int | None) -> Iterator[Piece]:
    """Split a piece into parts of at most `frames` frames; None: do not. A single first frame is a part by itself."""
    if frames is None:
        yield piece
        return
    place, (x, hidden) = piece
    first = 1 if place.is_single else min(frames, len(x))
    lengths = [first, *[frames] * ((len(x) - first) // frames)]
    if left := len(x) - sum(lengths):
        lengths.append(left)
    hiddens = [None] * len(lengths) if hidden is None else torch.split(hidden, lengths)
    for number, (part, hidden_part) in enumerate(zip(torch.split(x, lengths), hiddens, strict=True)):
        yield Piece(replace(place, is_single=place.is_single and number == 0), State(part, hidden_part))


def _with_rows(x: Tensor, rows: int) -> Tensor:  # [n, r, W, C] -> [n, rows, W, C]
    return x.new_empty(len(x), rows, *x.shape[2:])
