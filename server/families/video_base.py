"""What the video families share: clips `[B, C, F, H, W]`, or frames first where a pipeline keeps them so."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..errors import Impossible, WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Family, Sent, channels_last, on_grid, shape_text, wrong_channels

if TYPE_CHECKING:
    import torch


class Video(Family):
    """A clip from latents of a clip. Without more, as a causal VAE: the first frame alone, the others by the ratio."""

    kind = "video"
    layouts: ClassVar[tuple[str, ...]] = ("BCFHW",)
    """The axes of latents that are understood where the shape tells; the first are those of the pipeline's latents."""

    def num_frames(self, spec: LatentSpec, latent_frames: int) -> int:
        """How many frames a clip of so many latent frames has."""
        return (latent_frames - 1) * spec.temporal_compression_ratio + 1

    def latent_frames(self, spec: LatentSpec, num_frames: int) -> int:
        """The inverse. Raises Impossible where no whole number of latent frames holds the clip."""
        ratio = spec.temporal_compression_ratio
        before = (num_frames - 1) // ratio * ratio + 1
        if before != num_frames:
            raise Impossible(
                f"a clip of {num_frames} frames cannot be encoded: this model takes {ratio} k + 1 frames; "
                f"send {before} or {before + ratio}"
            )
        return (num_frames - 1) // ratio + 1

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Height and width are never asked for: clients send nonsense for videos, and the shape says it all.

        Four axes are one clip, or, unless the frames come first, pictures: clips of one frame.
        """
        usual = ", ".join(self.layouts[0]).replace("C", str(spec.channels))
        if len(shape) not in (4, 5):
            raise WrongShape(
                f"shape {shape_text(shape)} has {len(shape)} dimensions; this model takes video latents [{usual}]"
            )
        is_pictures = len(shape) == 4 and shape[1] == spec.channels != shape[0] and self.layouts[0] == "BCFHW"
        if is_pictures:
            return self.sized(spec, shape[0], 1, *shape[2:], axes="BCHW")
        clip = shape if len(shape) == 5 else (1, *shape)
        axes = next((axes for axes in self.layouts if clip[axes.index("C")] == spec.channels), None)
        if axes is None and (error := channels_last(spec, shape, "BCFHW"[5 - len(shape) :])):
            raise error
        if axes is None and len(shape) == 4:
            raise WrongChannels(
                f"shape {shape_text(shape)} is not one clip of this model; send video latents [{usual}]"
            )
        if axes is None:
            raise wrong_channels(spec, clip[self.layouts[0].index("C")], f"[{usual}]")
        batch, frames, h, w = (clip[axes.index(axis)] for axis in "BFHW")
        return self.sized(spec, batch, frames, h, w, axes=axes)

    def sized(self, spec: LatentSpec, batch: int, frames: int, h: int, w: int, *, axes: str = "BCFHW") -> Geometry:
        """Of latents `[B, C, F, h, w]`, whatever their axes' order was."""
        return Geometry(
            (batch, spec.channels, frames, h, w),
            is_packed=False,
            num_frames=self.num_frames(spec, frames),
            height=h * spec.vae_scale_factor,
            width=w * spec.vae_scale_factor,
            axes=axes,
        )

    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        grid, factor = self.grid(spec), spec.vae_scale_factor
        height, width = on_grid(height, grid, "height"), on_grid(width, grid, "width")
        shape = (batch, spec.channels, self.latent_frames(spec, frames), height // factor, width // factor)
        return Geometry(shape, is_packed=False, num_frames=frames, height=height, width=width)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        b, c, f, h, w = geometry.latent_shape
        if geometry.axes == "BCHW":
            return latents[:, :, None]  # [B, C, h, w] -> [B, C, 1, h, w]
        sizes = {"B": b, "C": c, "F": geometry.skipped_frames + f, "H": h, "W": w}
        sent = latents.reshape([sizes[axis] for axis in geometry.axes])
        ordered = sent.permute(*[geometry.axes.index(axis) for axis in "BCFHW"])  # [B, C, F, h, w]
        return ordered[:, :, geometry.skipped_frames :]

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Scaled latents have the axes of the pipeline's, others those of the VAE's."""
        scaled = self.scale(latents, spec, scaling)  # [B, C, F, h, w]
        is_scaled = scaling.from_model or scaling.factor is not None
        return scaled.permute(*["BCFHW".index(axis) for axis in self.layouts[0]]) if is_scaled else scaled
