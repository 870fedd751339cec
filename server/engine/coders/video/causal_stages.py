"""A causal decoder as a flat list of stages.

Between two stages a decode can be interrupted: the activations are stored, or thrown away and computed again. Every
stage has at most one norm with statistics of more than a pixel, and begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..image.layers import Linear
from .causal_layers import Attention, Block, CausalConv, CausalDecoder, Norm, Resnet, SpanNorm


class State(NamedTuple):
    """What there is between two stages: an activation and, in the middle of a residual block, the hidden one."""

    x: Tensor  # [n, H, W, C]
    hidden: Tensor | None = None  # [n, H, W, C']

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """Return both activations after a change."""
        return State(change(self.x), None if self.hidden is None else change(self.hidden))


@dataclass(frozen=True)
class Begin:
    """The first layer, which takes the latents."""

    conv: CausalConv | Linear
    repeats_input: int


@dataclass(frozen=True)
class Enter:
    """The first half of a residual block: conv1(silu(norm1(x))), and x through the shortcut."""

    resnet: Resnet


@dataclass(frozen=True)
class Leave:
    """The second half of a residual block: x + conv2(silu(norm2(hidden)))."""

    resnet: Resnet


@dataclass(frozen=True)
class Whole:
    """Layers that are not interrupted."""

    block: Block


@dataclass(frozen=True)
class End:
    """The last norm and layer, which makes the sample."""

    norm: Norm | None
    conv: CausalConv | Linear
    patch: int
    clamps: bool


Stage = Begin | Enter | Leave | Whole | End


def stages_of(decoder: CausalDecoder) -> tuple[Stage, ...]:
    """Return the stages of a decoder."""
    return tuple(_stages(decoder))


def _stages(decoder: CausalDecoder) -> Iterator[Stage]:
    yield Begin(decoder.conv_in, decoder.repeats_input)
    for block in decoder.blocks:
        if block.shortcut is not None:
            yield Whole(block)
            continue
        for step in block.steps:
            if isinstance(step, Resnet):
                yield Enter(step)
                yield Leave(step)
            else:
                yield Whole(Block((step,)))
    yield End(decoder.norm_out, decoder.conv_out, decoder.patch, decoder.clamps)


def span_norm(stage: Stage) -> SpanNorm | None:
    """Return the norm whose statistics must be known before a stage can run; None if it has none."""
    norm: Norm | None = None
    match stage:
        case Enter(resnet):
            norm = resnet.norm1
        case Leave(resnet):
            norm = resnet.norm2
        case Whole(Block(steps=(Attention() as attention,))):
            norm = attention.norm
        case End():
            norm = stage.norm
    return norm if isinstance(norm, SpanNorm) else None


def norm_input(stage: Stage, state: State) -> Tensor:
    """Return the tensor that the norm of a stage normalizes."""
    if isinstance(stage, Leave):
        assert state.hidden is not None
        return state.hidden
    return state.x


def needs_whole_frames(stage: Stage) -> bool:
    """Return whether a stage reads all rows of a frame, beside statistics."""
    return isinstance(stage, Whole) and any(isinstance(step, Attention) for step in stage.block.steps)
