"""The exact decoder of causal video VAEs: diffusers' own result, one chunk of frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....model_info import EXACT
from ....values import Layout
from ...kernels.choice import causal_kernels_for
from ...memory import free_bytes
from ..interface import Check, Coded, Emit, go_on
from ..layouts import Output
from . import cogvideox_layers, hunyuan_video_15_layers, hunyuan_video_layers, magvit_layers, mochi_layers, wan_layers
from .causal_passes import Run, VideoPast, advance
from .causal_plan import Leg, Network, Plan, Planner, Size
from .causal_stages import State, norm_input, span_norm
from .causal_statistics import Place, Statistics

CPU_BAND_BYTES = 4 << 20
GPU_BAND_BYTES = 256 << 20
# The size of the largest activation of the frames that are computed together.
CPU_PIECE_BYTES = 1  # one frame after the other: longer pieces do not make bands of rows faster
GPU_PIECE_BYTES = 1 << 30
QUERY_BYTES = 256 << 20
STRUCTURES = {
    **dict.fromkeys(wan_layers.PREFIXES, wan_layers),
    hunyuan_video_15_layers.NAME: hunyuan_video_15_layers,
    hunyuan_video_layers.NAME: hunyuan_video_layers,
    cogvideox_layers.NAME: cogvideox_layers,
    mochi_layers.NAME: mochi_layers,
    magvit_layers.NAME: magvit_layers,
}
CAUSAL_CLASSES = frozenset(STRUCTURES)

Write = Callable[[int, int, Tensor], None]
"""Takes finished rows `[n, rows, W, C]` of the sample: the number of their first frame, and their first row."""


class ExactCausalDecoder:
    """Takes over the weights of a VAE's decoder; `vae.decode` no longer works afterwards."""

    name = EXACT

    @staticmethod
    def unsupported_reason(vae: nn.Module) -> str | None:
        """Return the first reason why this decoder cannot run a VAE; None if it can."""
        structure = STRUCTURES.get(type(vae).__name__)
        if structure is None:
            return f"{type(vae).__name__} is not one of {', '.join(sorted(CAUSAL_CLASSES))}."
        reason: str | None = structure.decoder_reason(vae)
        return reason

    def __init__(self, vae: Any) -> None:
        weight = next(vae.decoder.parameters())
        self.kernels = causal_kernels_for(weight.device, weight.dtype)
        self.weights = STRUCTURES[type(vae).__name__].take_decoder(vae, self.kernels)
        self.network = Network(self.weights)

    def free_caches(self) -> None:
        """Do nothing, because this decoder caches nothing between calls."""

    def plan(self, frames: int, height: int, width: int, budget_bytes: int) -> Plan:
        """Plan a decode of latents of this size. budget_bytes: the memory limit of everything but the output."""
        on_cpu = self.weights.device.type == "cpu"
        planner = Planner(self.network, Size(frames, height, width), CPU_PIECE_BYTES if on_cpu else GPU_PIECE_BYTES)
        return planner.plan(budget_bytes, CPU_BAND_BYTES if on_cpu else GPU_BAND_BYTES)

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # [B, C, F, h, w], or [B, C, h, w] for a family of images
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says; equals diffusers' `decode` within the dtype's rounding."""
        weights = self.weights
        latents = latents.to(weights.device, weights.dtype)
        videos = latents if latents.ndim == 5 else latents[:, :, None]  # [B, C, F, h, w]
        batch, _, latent_frames, height, width = videos.shape
        ratio, frames = weights.spatial_ratio(), weights.frames(latent_frames)
        output = Output(layout, (batch * frames, ratio * height, ratio * width, weights.channels), videos)
        budget = free_bytes(weights.device) - output.tensor.nbytes if budget_bytes is None else budget_bytes
        plan = self.plan(latent_frames, height, width, budget)
        run = Run(self.kernels, plan.band_bytes, QUERY_BYTES, check)
        for index, video in enumerate(videos.permute(0, 2, 3, 4, 1).contiguous()):  # [F, h, w, C]
            write = _writer(output, index * frames, weights.dropped, ratio * height, emit)
            decode = VideoDecode(self.network, run, video, write)
            for leg in plan.legs:
                decode.run_leg(leg)
        if layout is not Layout.SAMPLE or latents.ndim == 4:
            return Coded(output.tensor, output.finite)  # [B F, ...]
        sample = output.tensor.view(batch, frames, *output.tensor.shape[1:]).transpose(1, 2)  # [B, C, F, H, W]
        return Coded(sample, output.finite)


def _writer(output: Output, first: int, dropped: int, height: int, emit: Emit | None) -> Write:
    """Return what writes finished rows of one video to the frames of the output from `first` on.

    dropped: how many frames at the start are not part of the video. emit: is given frames once their last row is done.
    """

    def write(frame: int, top: int, sample: Tensor) -> None:  # [n, rows, W, C]
        sample = sample[max(0, dropped - frame) :]
        start = first + max(0, frame - dropped)
        if not len(sample):
            return
        output.write(start, top, sample)
        if emit is not None and top + sample.shape[1] == height:
            emit(output.tensor[start : start + len(sample)])

    return write


class Piece(NamedTuple):
    """Some frames between two legs: where they are, and the activations."""

    place: Place
    state: State


@dataclass(frozen=True)
class Slab:
    """Latent rows [top, bottom) of a video, and [above, below) with the rows around them that have an influence."""

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

    def cut(self, x: Tensor, scale: int) -> Tensor:  # [n, scale h, W, C]
        """Return a copy of the rows of the slab and around it of an activation that has all rows."""
        return x[:, scale * self.above : scale * self.below].clone()


Take = Callable[[Piece, Slab, int], None]
"""Takes what stages made of some frames: the frames, the rows that they have, and the number of the first one."""


class VideoDecode:
    """The decode of one video, leg by leg.

    pieces: the activations that are stored between two legs, from the first frame to the last.
    """

    def __init__(self, network: Network, run: Run, video: Tensor, write: Write) -> None:  # [F, h, w, C]
        self.network, self.run, self.write = network, run, write
        self.statistics = Statistics(run.kernels.kernels)
        self.height = video.shape[1]
        weights = network.decoder
        post_quant = weights.post_quant
        latents = video if post_quant is None else F.linear(video, post_quant.weight, post_quant.bias)  # [F, h, w, C']
        lengths = [len(video)] if network.is_divisible else weights.chunk_lengths(len(video))
        is_single = weights.starts_single(len(video))
        self.pieces = [
            Piece(Place(number, is_single and number == 0, chunk), State(chunk))
            for number, chunk in enumerate(torch.split(latents, lengths))
        ]

    def run_leg(self, leg: Leg) -> None:
        """Run a leg: collect the statistics that it needs, then store what it makes, or write the sample."""
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
            for piece in self._entering(leg, slab, consumes=consumes):
                place, state = piece
                past.place = replace(place, latents=slab.cut(place.latents, 1))
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

    def _entering(self, leg: Leg, slab: Slab, *, consumes: bool) -> Iterator[Piece]:
        """Yield what is stored before a leg, as many frames at a time as the leg computes. It may be overwritten."""
        scale = self.network.scales[leg.start]
        pieces = self.pieces if consumes else list(self.pieces)
        pieces.reverse()
        while pieces:
            piece = pieces.pop()
            for part in _split(piece, leg.frames):
                if consumes:
                    yield part
                else:
                    yield Piece(part.place, part.state.map(partial(slab.cut, scale=scale)))

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
        """Write finished rows of the sample."""
        scale = self.network.scales[-1]
        self.write(frame, scale * slab.top, slab.inner(piece.state.x, scale))


def _split(piece: Piece, frames: int | None) -> Iterator[Piece]:
    """Split stored frames into as many as are computed at a time. The first frame of a video comes alone."""
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
