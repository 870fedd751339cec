"""What the video families share: clips `[B, C, F, H, W]`, or frames first where a pipeline keeps them so."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from server.errors import Impossible, WrongShape
from server.families.base import Family, Sent, on_grid, times, wrong_channels
from server.types import Geometry, LatentSpec, Scaling

if TYPE_CHECKING:
    import torch


class Video(Family):
    """A clip from latents of a clip. Without more, as a causal VAE: the first frame alone, the others by the ratio."""

    kind = "video"
    is_frames_first: ClassVar[bool] = False
    """The pipeline's latents are `[B, F, C, H, W]`; the VAE's own layout is understood where the shape tells."""

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

    def geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Height and width are never asked for: clients send nonsense for videos, and the shape says it all."""
        layout = f"[B, F, {spec.channels}, H, W]" if self.is_frames_first else f"[B, {spec.channels}, F, H, W]"
        if len(shape) not in (4, 5):
            raise WrongShape(
                f"shape {times(shape)} has {len(shape)} dimensions; this model takes video latents {layout}"
            )
        clip = shape if len(shape) == 5 else (1, *shape)
        is_frames_first = self.is_frames_first and (clip[2] == spec.channels or clip[1] != spec.channels)
        batch, channels, frames = (clip[0], clip[2], clip[1]) if is_frames_first else clip[:3]
        if channels != spec.channels and len(shape) == 4:
            raise WrongShape(f"shape {times(shape)} is not one clip of this model; send video latents {layout}")
        if channels != spec.channels:
            raise wrong_channels(spec, channels, layout)
        return self.sized(spec, batch, frames, *clip[3:], is_frames_first=is_frames_first)

    def sized(
        self, spec: LatentSpec, batch: int, frames: int, h: int, w: int, *, is_frames_first: bool = False
    ) -> Geometry:
        """Of latents `[B, C, F, h, w]`, whatever their axes' order was."""
        return Geometry(
            (batch, spec.channels, frames, h, w),
            is_packed=False,
            num_frames=self.num_frames(spec, frames),
            height=h * spec.vae_scale_factor,
            width=w * spec.vae_scale_factor,
            is_frames_first=is_frames_first,
        )

    def encoded(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        grid, factor = self.grid(spec), spec.vae_scale_factor
        height, width = on_grid(height, grid, "height"), on_grid(width, grid, "width")
        shape = (batch, spec.channels, self.latent_frames(spec, frames), height // factor, width // factor)
        return Geometry(shape, is_packed=False, num_frames=frames, height=height, width=width)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        b, c, f, h, w = geometry.latent_shape
        if geometry.is_frames_first:
            return latents.reshape(b, f, c, h, w).transpose(1, 2)  # [B, F, C, h, w] -> [B, C, F, h, w]
        return latents.reshape(geometry.latent_shape)

    def finish(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        scaled = self.scale(latents, spec, scaling)  # [B, C, F, h, w]
        return scaled.transpose(1, 2) if self.is_frames_first and _is_scaled(scaling) else scaled


def _is_scaled(scaling: Scaling) -> bool:
    """The pipeline's latents were asked for, not the VAE's own."""
    return scaling.from_model or scaling.factor is not None
