"""The diffusion decoder of LTX-2.5, which makes the pixels of LTX-2's latents out of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import BadRequest, Impossible
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .ltx import LTX2

if TYPE_CHECKING:
    import torch

MOST_STEPS = 100
LEAST_FRAMES = 3  # that LTX-2.5's decoder takes, in latent frames; see `least_size`


class LTX2Diffusion(LTX2):
    """Takes the latents of LTX-2, and has no encoder.

    `seed` seeds the noise and is 0 by default, so that the same request always gives the same video. `decode_steps` is
    the number of denoising steps; by default it is that of the config, which is 1 for LTX-2.5.
    """

    name = "ltx2_diffusion"
    class_names = ("LTX2VideoDiffusionDecoderModel",)
    takes_batches = False  # the noise of a video must not depend on the videos beside it

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read both ratios from the config."""
        return config["spatial_compression_ratio"], config["temporal_compression_ratio"]

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Say also that decoding takes a seed, and that there is no encoder."""
        return replace(super().describe(config), takes_seed=True, has_encoder=False)

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of the shortest video."""
        batch, channels, _, *sides = super().latent_shape(spec, height, width)
        return (batch, channels, LEAST_FRAMES, *sides)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept the latents of LTX-2, and read `seed` and `decode_steps`."""
        found = super().decode_geometry(spec, shape, sent)
        steps = sent.integer("decode_steps")
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            raise BadRequest(f"decode_steps must be between 1 and {MOST_STEPS}, not {steps}")
        arguments = {"seed": sent.long("seed") or 0, **({"num_inference_steps": steps} if steps else {})}
        return replace(found, arguments=tuple(arguments.items()))

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Decode one video. Raises Impossible if it is smaller than a window of the decoder's attention.

        arguments: `generator`, which draws the noise, and `num_inference_steps`.
        """
        _check_size(vae.config, *latents.shape[2:])
        return super().decode(vae, latents, **arguments)


def _check_size(config: Any, frames: int, height: int, width: int) -> None:
    """Raise Impossible if latents of this size are smaller than the window of some stage."""
    least = least_size(config)
    if frames < least[0] or height < least[1] or width < least[2]:
        raise Impossible(
            f"latents of {frames} frames of {height}x{width} are too small for this decoder, which takes at least "
            f"{least[0]} latent frames of {least[1]}x{least[2]}; send a longer or larger video, or use a model with "
            "the other decoder of LTX-2"
        )


def least_size(config: Any) -> tuple[int, int, int]:
    """Return the least latent frames, height and width that fill the attention windows of every stage.

    config: of the diffusers module. The stages before the last one see extra frames after the end of the video.
    """
    strides = config.decoder_upsample_strides
    kernels = (*config.decoder_stage_kernels, config.decoder_stage5_kernel)
    extra = kernels[0][0] // 2 * 2
    frames, height, width = 1, 1, 1
    while not _fits(frames, 0, extra, strides, kernels):
        frames += 1
    while not _fits(height, 1, 0, strides, kernels):
        height += 1
    while not _fits(width, 2, 0, strides, kernels):
        width += 1
    return frames, height, width


def _fits(size: int, axis: int, extra: int, strides: Any, kernels: Any) -> bool:
    """Return whether `size` latents along an axis fill the windows of all stages. extra: latents after the end."""
    for stage, kernel in enumerate(kernels):
        ratio = prod(stride[axis] for stride in strides[:stage])
        is_last = stage == len(kernels) - 1
        latents = size if is_last else size + extra
        # along time, each doubling drops the first of its two copies of the first frame
        tokens = (latents - 1) * ratio + 1 if axis == 0 else latents * ratio
        if tokens < kernel[axis]:
            return False
    return True
