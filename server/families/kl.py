"""AutoencoderKL (SD1, SD2, SDXL, SD3 and others): latents `[B, C, H, W]`, or packed `[B, S, 4C]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadRequest, WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry
from .base import Family, Sent, axis_too_many, channels_last, on_grid, shape_text, wrong_channels

if TYPE_CHECKING:
    import torch


def patchify(latents: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Turn latents `[B, C, h, w]` into patches `[B, p p C, h / p, w / p]`, ordered as the pipelines that pack do."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, c * patch * patch, h // patch, w // patch)


def unpatchify(patches: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Turn patches into latents: the inverse of `patchify`."""
    b, d, h, w = patches.shape
    latents = patches.reshape(b, d // patch**2, patch, patch, h, w).permute(0, 1, 4, 2, 5, 3)  # [B, C, h, p, w, p]
    return latents.reshape(b, d // patch**2, h * patch, w * patch)


class KL(Family):
    """Image latents, unscaled as `StableDiffusionXLPipeline.__call__` and `FluxPipeline.__call__` do."""

    name = "kl"
    kind = "image"
    class_names: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return 2 for each halving between the encoder's levels, and 1."""
        return 2 ** (len(config["block_out_channels"]) - 1), 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept `[B, C, H, W]`, `[C, H, W]`, packed `[B, S, p p C]`, and Kandinsky 5's `[B, 1, H, W, C]`.

        Height and width are read only for packed latents, which need them. Raises WrongShape, WrongChannels.
        """
        if len(shape) == 5 and shape[1] == 1 and shape[4] == spec.channels:  # Kandinsky 5: [B, 1, h, w, C]
            return replace(self._unpacked(spec, (shape[0], shape[4], *shape[2:4])), axes="BHWC")
        if len(shape) == 4:
            return self._unpacked(spec, shape)
        if len(shape) == 3:
            return self._three_axes(spec, shape, sent)
        if meant := axis_too_many(shape, 4, spec.channels):
            raise WrongShape(f"shape {shape_text(shape)} has {len(shape)} dimensions, one too many; send shape {meant}")
        raise WrongShape(
            f"shape {shape_text(shape)} has {len(shape)} dimensions; "
            f"this model takes latents [B, {spec.channels}, H, W], one latent [{spec.channels}, H, W], "
            f"or packed latents [B, S, {spec.patch_size**2 * spec.channels}]"
        )

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """Return the sizes for encoding images. Raises Impossible if a side is smaller than `grid`."""
        grid = self.grid(spec)
        height, width = on_grid(height, grid, "height"), on_grid(width, grid, "width")
        h, w = height // spec.vae_scale_factor, width // spec.vae_scale_factor
        return Geometry((batch, spec.channels, h, w), is_packed=False, num_frames=1, height=height, width=width)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Unpack as `FluxPipeline._unpack_latents` does, and bring Kandinsky 5's latents to `[B, C, h, w]`."""
        if geometry.axes == "BHWC":
            return latents[:, 0].permute(0, 3, 1, 2)  # [B, 1, h, w, C] -> [B, C, h, w]
        if not geometry.is_packed:
            return super().unpack(latents, geometry)
        b, _, h, w = geometry.latent_shape
        rows, columns = h // self.patch_size, w // self.patch_size
        patches = latents.transpose(1, 2).reshape(b, -1, rows, columns)  # [B, S, p p C] -> [B, p p C, h / p, w / p]
        return unpatchify(patches, self.patch_size)

    def _unpacked(self, spec: LatentSpec, shape: tuple[int, ...]) -> Geometry:
        if shape[1] != spec.channels:
            raise channels_last(spec, shape, "BCHW") or wrong_channels(spec, shape[1], f"[B, {spec.channels}, H, W]")
        height, width = (n * spec.vae_scale_factor for n in shape[2:])
        return Geometry(shape, is_packed=False, num_frames=1, height=height, width=width)

    def _three_axes(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes of packed latents, or of one latent without a batch axis.

        They are packed if the last axis is p p C and the number of tokens fits the height and width that were sent.
        """
        batch, tokens, depth = shape
        looks_packed = depth == spec.patch_size**2 * spec.channels
        is_one_latent = shape[0] == spec.channels
        if looks_packed:
            size = None
            try:
                size = sent.pixel_size()
            except BadRequest:
                if not is_one_latent:
                    raise
            if size is not None:
                rows, columns = (pixels // (spec.vae_scale_factor * spec.patch_size) for pixels in size)
                if rows * columns == tokens:
                    return self._packed(spec, batch, rows * spec.patch_size, columns * spec.patch_size)
            if not is_one_latent:
                raise _unfitting_tokens(spec, tokens, size)
        if is_one_latent:
            return self._unpacked(spec, (1, *shape))
        if error := channels_last(spec, shape, "CHW"):
            raise error
        raise WrongChannels(
            f"shape {shape_text(shape)} is neither one latent [{spec.channels}, H, W] nor packed latents "
            f"[B, S, {spec.patch_size**2 * spec.channels}] of this model"
        )

    def _packed(self, spec: LatentSpec, batch: int, h: int, w: int) -> Geometry:
        return Geometry(
            (batch, spec.channels, h, w),
            is_packed=True,
            num_frames=1,
            height=h * spec.vae_scale_factor,
            width=w * spec.vae_scale_factor,
        )


def _unfitting_tokens(spec: LatentSpec, tokens: int, size: tuple[int, int] | None) -> WrongShape:
    side = spec.vae_scale_factor * spec.patch_size
    if size is None:
        return WrongShape("packed latents need height and width, the image's size in pixels; send both")
    height, width = size
    return WrongShape(
        f"{tokens} tokens do not fit {height}x{width}: packed latents of that size have "
        f"({height}/{side}) x ({width}/{side}) = {(height // side) * (width // side)} tokens; check height and width"
    )
