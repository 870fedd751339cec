"""The common part of the video families: latents `[B, C, F, H, W]`, or another order of axes if a pipeline uses one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..errors import Impossible, WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Family, Sent, channels_last, on_grid, shape_text, wrong_channels

if TYPE_CHECKING:
    import torch


class Video(Family):
    """A family of video VAEs.

    By default it is causal: the first latent frame decodes to one frame, every other one to as many frames as the
    temporal compression ratio.

    layouts: the orders of axes that are accepted, as far as the shape tells them apart. The first one is that of the
        pipeline's latents.
    """

    kind = "video"
    layouts: ClassVar[tuple[str, ...]] = ("BCFHW",)

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """Return how many frames so many latent frames decode to."""
        return (latent_frames - 1) * spec.temporal_compression_ratio + 1

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        """Return how many latent frames a video of so many frames encodes to: the inverse of `num_frames`.

        Raises Impossible if the frames do not fill whole latent frames.
        """
        ratio = spec.temporal_compression_ratio
        before = (num_frames - 1) // ratio * ratio + 1
        if before != num_frames:
            raise Impossible(
                f"a video of {num_frames} frames cannot be encoded: this model takes {ratio} k + 1 frames; "
                f"send {before} or {before + ratio}"
            )
        return (num_frames - 1) // ratio + 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes of video latents, from their shape only.

        Height and width are not read, because clients send wrong values for videos. A shape of four axes is one video
        without a batch axis or, for families with the layout `[B, C, F, H, W]`, a batch of images `[B, C, H, W]`, which
        are videos of one frame. Raises WrongShape, WrongChannels.
        """
        usual = ", ".join(self.layouts[0]).replace("C", str(spec.channels))
        if len(shape) not in (4, 5):
            raise WrongShape(
                f"shape {shape_text(shape)} has {len(shape)} dimensions; this model takes video latents [{usual}]"
            )
        are_images = len(shape) == 4 and shape[1] == spec.channels != shape[0] and self.layouts[0] == "BCFHW"
        if are_images:
            return self.sized(spec, shape[0], 1, *shape[2:], axes="BCHW")
        video = shape if len(shape) == 5 else (1, *shape)
        axes = next((axes for axes in self.layouts if video[axes.index("C")] == spec.channels), None)
        if axes is None and (error := channels_last(spec, shape, "BCFHW"[5 - len(shape) :])):
            raise error
        if axes is None and len(shape) == 4:
            raise WrongChannels(
                f"shape {shape_text(shape)} is not one video of this model; send video latents [{usual}]"
            )
        if axes is None:
            raise wrong_channels(spec, video[self.layouts[0].index("C")], f"[{usual}]")
        batch, frames, h, w = (video[axes.index(axis)] for axis in "BFHW")
        return self.sized(spec, batch, frames, h, w, axes=axes)

    def sized(self, spec: LatentSpec, batch: int, frames: int, h: int, w: int, *, axes: str = "BCFHW") -> Geometry:
        """Return the sizes of a batch of latents of `frames` latent frames of h x w.

        axes: the order of the axes in which they were sent.
        """
        return Geometry(
            (batch, spec.channels, frames, h, w),
            is_packed=False,
            num_frames=self.num_frames(spec, frames),
            height=h * spec.vae_scale_factor,
            width=w * spec.vae_scale_factor,
            axes=axes,
        )

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """Return the sizes for encoding videos. Raises Impossible if a side or the frames do not fit the VAE."""
        grid, factor = self.grid(spec), spec.vae_scale_factor
        height, width = on_grid(height, grid, "height"), on_grid(width, grid, "width")
        shape = (batch, spec.channels, self.latent_frames(spec, frames), height // factor, width // factor)
        return Geometry(shape, is_packed=False, num_frames=frames, height=height, width=width)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return latents `[B, C, F, h, w]` without the skipped frames."""
        b, c, f, h, w = geometry.latent_shape
        if geometry.axes == "BCHW":
            return latents[:, :, None]  # [B, C, h, w] -> [B, C, 1, h, w]
        sizes = {"B": b, "C": c, "F": geometry.skipped_frames + f, "H": h, "W": w}
        sent = latents.reshape([sizes[axis] for axis in geometry.axes])
        ordered = sent.permute(*[geometry.axes.index(axis) for axis in "BCFHW"])  # [B, C, F, h, w]
        return ordered[:, :, geometry.skipped_frames :]

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Return scaled latents in the axes of the pipeline's latents, and unscaled ones in those of the VAE."""
        scaled = self.scale(latents, spec, scaling)  # [B, C, F, h, w]
        is_scaled = scaling.from_model or scaling.factor is not None
        return scaled.permute(*["BCFHW".index(axis) for axis in self.layouts[0]]) if is_scaled else scaled
