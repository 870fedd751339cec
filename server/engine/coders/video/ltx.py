"""LTX-Video and LTX-2: diffusers' blocks on sliding windows of frames, because not every version is causal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .slabs import Part, cut, unpatchify
from .windows import MOST, FrameReach, slide

Step = tuple[Any, dict[str, Any]]


class LTX:
    """A streamed network without a head: the whole decoder is local in space."""

    def __init__(self, vae: Any) -> None:
        self.decoder = vae.decoder
        self.dtype = self.decoder.conv_in.conv.weight.dtype
        self.patch: int = self.decoder.patch_size
        self.channels: int = self.decoder.conv_out.conv.out_channels // self.patch**2
        # How many frames a convolution reads before and after each frame.
        self.looks = (2, 0) if vae.config.decoder_causal else (1, 1)
        is_second = type(vae).__name__ == "AutoencoderKLLTX2Video"
        self.switch = {"causal": vae.config.decoder_causal} if is_second else {}
        steps = [Part(step, (step,)) for step, _ in self._steps(None)]
        self.parts = (*steps, Part(self._last, (self.decoder.conv_out,), self.patch))

    def values_per_pixel(self, latent_frames: int) -> float:
        """Return the measured values: they grow with the window, which has at most MOST frames and four around them."""
        width: int = self.decoder.conv_out.conv.in_channels
        return 7 * width / self.patch**2 * min(MOST + 4, 8 * latent_frames)

    def head(self, latents: Tensor) -> Iterator[Tensor]:  # [1, C, F, h, w]
        """Yield the latents unchanged."""
        yield latents

    def tail(self, chunks: Iterable[Tensor], cuts: Sequence[slice], **arguments: float) -> Iterator[Tensor]:
        """Run the decoder, one sliding window after the other."""
        temb = self._timestep(arguments.get("timestep"))
        frames: Iterator[Tensor] = (cut(chunk, cuts[0]) for chunk in chunks)  # [1, C, n, h, w]
        for (step, extra), rows in zip(self._steps(temb), cuts[1:-1], strict=True):
            frames = slide(partial(step, **extra, **self.switch), self._reach(step), frames, rows)
        return slide(partial(self._last, temb=temb), self._reach(self.decoder.conv_out), frames, cuts[-1])

    def _timestep(self, timestep: float | None) -> Tensor | None:
        scale: Tensor | None = self.decoder.timestep_scale_multiplier
        return None if timestep is None or scale is None else scale.new_tensor([timestep]).to(self.dtype) * scale  # [1]

    def _steps(self, temb: Tensor | None) -> Iterator[Step]:
        """Yield the decoder's convolutions, upsamplers and residual blocks in order, each with its arguments."""
        yield self.decoder.conv_in, {}
        for block in (self.decoder.mid_block, *self.decoder.up_blocks):
            if getattr(block, "conv_in", None) is not None:
                yield block.conv_in, {"temb": temb}
            yield from ((upsampler, {}) for upsampler in getattr(block, "upsamplers", None) or ())
            embedded = self._embed(block, temb)
            yield from ((resnet, {"temb": embedded}) for resnet in block.resnets)

    def _embed(self, block: Any, temb: Tensor | None) -> Tensor | None:  # [1] -> [1, C, 1, 1, 1]
        if temb is None:
            return None
        size = {"resolution": None, "aspect_ratio": None, "batch_size": 1, "hidden_dtype": self.dtype}
        return block.time_embedder(timestep=temb, **size).view(1, -1, 1, 1, 1)  # type: ignore[no-any-return]  # diffusers is untyped

    def _reach(self, step: Any) -> FrameReach:
        """Return the reach of a step: a residual block has two convolutions, any other step one."""
        before, after = self.looks
        convs = 2 if hasattr(step, "conv2") else 1
        return FrameReach(convs * before, convs * after, step.stride[0] if hasattr(step, "upscale_factor") else 1)

    def _last(self, x: Tensor, temb: Tensor | None) -> Tensor:  # [1, C, n, H, W] -> [1, 3, n, p H, p W]
        decoder = self.decoder
        x = decoder.norm_out(x) if self.switch else decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)
        if temb is not None:
            table = decoder.scale_shift_table[None, ..., None, None, None]
            shift, scale = (self._embed(decoder, temb).unflatten(1, (2, -1)) + table).unbind(1)  # type: ignore[union-attr]  # a decoder with a timestep has this table
            x = x * (1 + scale) + shift
        x = decoder.conv_out(decoder.conv_act(x), **self.switch)  # [1, 3 p p, n, H, W]
        return unpatchify(x, self.patch)
