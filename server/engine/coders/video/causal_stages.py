"""A causal decoder or encoder as a flat list of stages.

Between two stages a run can be interrupted: the activations are stored, or thrown away and computed again. Every
stage has at most one norm with statistics of more than a pixel, and begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..image.layers import Linear
from .causal_encoder_layers import CausalEncoder, EncoderBlock, FrameAttention
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
    """The first layer, which takes the latents or the pixels.

    patch: side of the pixel blocks that become channels before the layer; 1 for none. waves: as `CausalEncoder` says.
    """

    conv: CausalConv | Linear
    repeats_input: int = 0
    patch: int = 1
    waves: Tensor | None = None  # [K]


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

    block: Block | EncoderBlock


@dataclass(frozen=True)
class End:
    """The last norm and layer, which makes the sample, or the parameters of the posterior.

    patch, clamps: as `CausalDecoder` says. averages, quant, repeats_last: `averages_output`, `quant` and `repeats_last`
    of a `CausalEncoder`.
    """

    norm: Norm | None
    conv: CausalConv | Linear
    patch: int = 1
    clamps: bool = False
    averages: bool = False
    quant: Linear | None = None
    repeats_last: int = 0


Stage = Begin | Enter | Leave | Whole | End


def stages_of(coder: CausalDecoder | CausalEncoder) -> tuple[Stage, ...]:
    """Return the stages of a decoder or an encoder."""
    if isinstance(coder, CausalDecoder):
        first = Begin(coder.conv_in, repeats_input=coder.repeats_input)
        last = End(coder.norm_out, coder.conv_out, patch=coder.patch, clamps=coder.clamps)
    else:
        first = Begin(coder.conv_in, patch=coder.patch, waves=coder.waves)
        last = End(
            coder.norm_out,
            coder.conv_out,
            averages=coder.averages_output,
            quant=coder.quant,
            repeats_last=coder.repeats_last,
        )
    return first, *(stage for block in coder.blocks for stage in _stages(block)), last


def _stages(block: Block | EncoderBlock) -> Iterator[Stage]:
    if block.shortcut is not None:
        yield Whole(block)
        return
    for layer in block.apart():
        if isinstance(step := layer.steps[0], Resnet):
            yield Enter(step)
            yield Leave(step)
        else:
            yield Whole(layer)


def span_norm(stage: Stage) -> SpanNorm | None:
    """Return the norm whose statistics must be known before a stage can run; None if it has none."""
    norm: Norm | None = None
    match stage:
        case Enter(resnet):
            norm = resnet.norm1
        case Leave(resnet):
            norm = resnet.norm2
        case Whole(block) if isinstance(first := block.steps[0], Attention | FrameAttention):
            norm = first.norm
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
    """Return whether a stage reads all rows of a frame for more than statistics."""
    return isinstance(stage, Whole) and any(isinstance(step, Attention) for step in stage.block.steps)
