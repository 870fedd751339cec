"""The video VAE of MiniMax-H3: fixed clip lengths, tiles that are part of the model, and RGB normalised as ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import Impossible, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .video_base import Video

if TYPE_CHECKING:
    import torch

CLIP_FRAMES, CLIP_LATENTS = 17, 5  # the frames and latent frames that each further clip of a video adds
LAST_FRAMES, LAST_LATENTS = 5, 2  # the frames and latent frames at the end of a video, which overlap the next clip
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class H3Clips(Video):
    """The numbers of frames that MiniMax-H3 takes.

    `5 n + 2` latent frames decode to `17 n + 5` frames, for n of at least 1. One image encodes to one latent frame,
    which conditions the pipeline and cannot be decoded.
    """

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """Return how many frames so many latent frames decode to, rounded down to whole clips."""
        return (latent_frames - LAST_LATENTS) // CLIP_LATENTS * CLIP_FRAMES + LAST_FRAMES

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        """Return how many latent frames a video encodes to. Raises Impossible unless it has 1 or 17 n + 5 frames."""
        if num_frames == 1:
            return 1
        clips, rest = divmod(num_frames - LAST_FRAMES, CLIP_FRAMES)
        if clips < 1 or rest:
            before = max(1, clips) * CLIP_FRAMES + LAST_FRAMES
            raise Impossible(
                f"a video of {num_frames} frames cannot be encoded: this model takes one image or {CLIP_FRAMES} n + "
                f"{LAST_FRAMES} frames; send {before} or {before + CLIP_FRAMES}"
            )
        return clips * CLIP_LATENTS + LAST_LATENTS

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of the shortest video."""
        batch, channels, _, *sides = super().latent_shape(spec, height, width)
        return (batch, channels, CLIP_LATENTS + LAST_LATENTS, *sides)

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes, from the shape only. Raises WrongShape too unless there are 5 n + 2 latent frames."""
        found = super().decode_geometry(spec, shape, sent)
        frames = found.latent_shape[2]
        clips, rest = divmod(frames - LAST_LATENTS, CLIP_LATENTS)
        if clips < 1 or rest:
            before = max(1, clips) * CLIP_LATENTS + LAST_LATENTS
            raise WrongShape(
                f"{frames} latent frames cannot be decoded: this model takes {CLIP_LATENTS} n + {LAST_LATENTS} latent "
                f"frames, which are {CLIP_FRAMES} n + {LAST_FRAMES} frames; send {before} or {before + CLIP_LATENTS}"
            )
        return found


class MiniMaxH3(H3Clips):
    """Unscales by channel and reverts the normalisation of the pixels, as `MiniMaxH3VideoDecodeStep` does.

    diffusers decodes and encodes in blended tiles of 256x256 pixels, and so were the released frames made.
    """

    name = "minimax_h3"
    class_names = ("AutoencoderKLMiniMaxH3",)
    is_scaled_in_comfyui = True  # ComfyUI's VAE unscales them; latent_formats.MiniMaxH3Video changes nothing
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the products of the downsampling factors. Raises ValueError for other clip lengths than H3's."""
        if (config["clip_length"], config["token_drop"]) != (CLIP_FRAMES, CLIP_LATENTS - LAST_LATENTS):
            raise ValueError(f"clip_length must be {CLIP_FRAMES} and token_drop {CLIP_LATENTS - LAST_LATENTS}")
        return prod(config["spatial_downsample_factors"]), prod(config["temporal_downsample_factors"])

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """Decode in the shipped tiles, and map the pixels to [-1, 1].

        The sample of a half-precision VAE is float16, because bfloat16 would round the pixels a second time.
        """
        decoded = super().decode(vae, latents)  # [B, 3, F, H, W]
        is_half = decoded.element_size() == 2
        decoded = decoded.float()
        sample = 2 * (decoded * _axes(PIXEL_STD, decoded) + _axes(PIXEL_MEAN, decoded)) - 1
        return sample.half() if is_half else sample

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise the pixels and encode them in the shipped tiles. Return the posterior's parameters."""
        unit = pixels.float() / 2 + 0.5  # [B, 3, F, H, W]
        return super().encode(vae, (unit - _axes(PIXEL_MEAN, unit)) / _axes(PIXEL_STD, unit))


def _axes(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Return values for the channels of `like`, `[1, C, 1, 1, 1]`."""
    return like.new_tensor(values).reshape(1, -1, 1, 1, 1)
