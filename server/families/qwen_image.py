"""Qwen-Image: packed image latents, and a video VAE that decodes each image as a video of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..model_info import LatentSpec
from ..values import Geometry
from .base import Sent
from .kl import KL

if TYPE_CHECKING:
    import torch


class QwenImage(KL):
    """Unscales with `latents * std + mean`, as `QwenImagePipeline.__call__` does."""

    name = "qwen_image"
    class_names = ("AutoencoderKLQwenImage",)
    channels_key = "z_dim"
    is_usually_packed = True
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each downsample, and 1."""
        return 2 ** len(config["temperal_downsample"]), 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept what `KL.decode_geometry` accepts, and the VAE's own layout `[B, C, 1, H, W]`."""
        is_one_frame = len(shape) == 5 and shape[2] == 1
        return super().decode_geometry(spec, shape[:2] + shape[3:] if is_one_frame else shape, sent)

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """Decode each image as a video of one frame."""
        return super().decode(vae, latents[:, :, None], **arguments)[:, :, 0]  # [B, C, 1, h, w] -> [B, 3, H, W]

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode each image as a video of one frame."""
        return super().encode(vae, pixels[:, :, None])[:, :, 0]  # [B, 3, 1, H, W] -> [B, 2C, h, w]


class QwenImageLayered(QwenImage):
    """Qwen-Image-Layered: the layers of an image, each with an alpha channel, behind the image itself.

    The pipeline's latents are `[B, C, 1 + layers, h, w]`, or packed. The first frame is the input image and is not
    decoded. Every layer decodes to an image of its own, so that a batch of B images becomes one of `B * layers`.
    """

    name = "qwen_image_layered"

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read also how many channels the images have."""
        return replace(super().describe(config), image_channels=config["input_channels"])

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept the pipeline's latents, and single layers as `QwenImage.decode_geometry` accepts images."""
        depth = self.patch_size**2 * spec.channels
        if len(shape) == 5 and shape[1] == spec.channels and shape[2] > 1:
            found = super().decode_geometry(spec, (shape[0], shape[1], 1, *shape[3:]), sent)
            return self._layers(found, shape[2] - 1)
        size = sent.pixel_size() if len(shape) == 3 and shape[2] == depth else None
        if size is None:
            return super().decode_geometry(spec, shape, sent)
        side = spec.vae_scale_factor * self.patch_size
        tokens = (size[0] // side) * (size[1] // side)  # of one layer
        frames = shape[1] // tokens if tokens and shape[1] % tokens == 0 else 1
        found = super().decode_geometry(spec, (shape[0], shape[1] // frames, depth), sent)
        return self._layers(found, frames - 1) if frames > 1 else found

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return the latents of the layers, `[B layers, C, h, w]`."""
        if not geometry.skipped_frames:
            return super().unpack(latents, geometry)
        count, channels, h, w = geometry.latent_shape
        batch = latents.shape[0]
        layers = count // batch
        if geometry.is_packed:  # [B, (1 + layers) S, p p C] -> [B (1 + layers), S, p p C]
            frames = replace(geometry, latent_shape=(batch * (1 + layers), channels, h, w), skipped_frames=0)
            latents = super().unpack(latents.reshape(batch * (1 + layers), -1, latents.shape[2]), frames)
            videos = latents.reshape(batch, 1 + layers, channels, h, w)
        else:
            videos = latents.transpose(1, 2)  # [B, C, 1 + layers, h, w] -> [B, 1 + layers, C, h, w]
        return videos[:, 1:].reshape(count, channels, h, w)

    def _layers(self, found: Geometry, layers: int) -> Geometry:
        """Return the sizes for so many layers of each image, given those for one."""
        batch, *rest = found.latent_shape
        return replace(found, latent_shape=(batch * layers, *rest), skipped_frames=1)


class QwenImage21(QwenImage):
    """Qwen-Image 2.1: a token is one latent pixel, and the images have an alpha channel."""

    name = "qwen_image_21"
    class_names = ("AutoencoderKLQwenImage21",)
    patch_size = 1

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Read the spatial ratio from the config."""
        return config["scale_factor_spatial"], 1

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read also how many channels the images have."""
        return replace(super().describe(config), image_channels=config["in_channels"])
