"""Stable Video Diffusion: an image VAE whose decoder also looks at neighbouring frames.

Latents are `[B, F, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .video_base import Video

if TYPE_CHECKING:
    import torch


class StableVideo(Video):
    """Unscales with only the scaling factor, and decodes in chunks as `StableVideoDiffusionPipeline` does."""

    name = "stable_video"
    class_names = ("AutoencoderKLTemporalDecoder",)
    layouts = ("BFCHW", "BCFHW")

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the encoder's levels, and 1."""
        return 2 ** (len(config["block_out_channels"]) - 1), 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes, with `decode_chunk_size` as an argument of the decode if it was sent.

        Frames only see the frames of their own chunk, so the size of the chunks changes the pixels.
        """
        found = super().decode_geometry(spec, shape, sent)
        chunk = sent.integer("decode_chunk_size")
        return replace(found, arguments=(("chunk", chunk),)) if chunk else found

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """Decode in chunks of `chunk` frames; without this argument, each video as one chunk."""
        batch, _, frames = latents.shape[:3]
        size = int(arguments.get("chunk", frames))
        out: torch.Tensor | None = None  # [B, F, 3, H, W]
        for index in range(batch):  # a chunk never contains frames of two videos, which may come from two clients
            video = latents[index].transpose(0, 1)  # [4, F, h, w] -> [F, 4, h, w]
            for start in range(0, frames, size):
                chunk = video[start : start + size]
                sample = vae.decode(chunk, num_frames=len(chunk), return_dict=False)[0]  # [n, 3, H, W]
                out = sample.new_empty(batch, frames, *sample.shape[1:]) if out is None else out
                out[index, start : start + size] = sample
        assert out is not None
        return out.transpose(1, 2)  # [B, 3, F, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode all frames as single images."""
        batch, _, frames = pixels.shape[:3]
        parameters = super().encode(vae, pixels.transpose(1, 2).flatten(0, 1))  # [B F, 3, H, W] -> [B F, 8, h, w]
        return parameters.reshape(batch, frames, *parameters.shape[1:]).transpose(1, 2)
