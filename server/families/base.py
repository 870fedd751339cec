"""What a VAE family is: how its latents are laid out, packed and scaled. Knows no HTTP, no device and no weights.

The arithmetic is written with tensor methods only, so that reading this package never imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from server.errors import Impossible, TooLarge, WrongShape
from server.types import Geometry, Kind, LatentSpec, Limits, Scaling

if TYPE_CHECKING:
    import torch

PixelSize = Callable[[], tuple[int, int] | None]


class Family(ABC):
    """One file in this package: subclass, name the diffusers classes, add it to `FAMILIES`."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    class_names: ClassVar[tuple[str, ...]]
    config_defaults: ClassVar[Mapping[str, Any]]
    """The diffusers class's own defaults, for the keys that a config.json may leave out."""
    channels_key: ClassVar[str] = "latent_channels"
    is_usually_packed: ClassVar[bool] = False

    @abstractmethod
    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Spatial and temporal compression of a VAE with this config.json."""

    @abstractmethod
    def geometry(self, spec: LatentSpec, shape: tuple[int, ...], size: PixelSize) -> Geometry:
        """The request's sizes. `size` gives the height and width that were sent, and is asked for packed latents only.

        Raises WrongShape.
        """

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read a VAE's config.json, with diffusers' own defaults where a key is missing."""
        known = {**self.config_defaults, **{key: value for key, value in config.items() if value is not None}}
        spatial, temporal = self.scale_factors(known)
        mean, std = known.get("latents_mean"), known.get("latents_std")
        return LatentSpec(
            family=self.name,
            kind=self.kind,
            channels=known[self.channels_key],
            vae_scale_factor=spatial,
            temporal_compression_ratio=temporal,
            scaling_factor=known.get("scaling_factor"),
            shift_factor=known.get("shift_factor"),
            latents_mean=tuple(mean) if mean else None,
            latents_std=tuple(std) if std else None,
            force_upcast=config.get("force_upcast"),
            is_usually_packed=self.is_usually_packed,
        )

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """The spec once the weights are there, for families that keep statistics in them. vae: the diffusers module."""
        return spec

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """What the VAE takes for one picture, or a clip of one frame, of height x width pixels."""
        frames = (1,) if spec.kind == "video" else ()
        return (1, spec.channels, *frames, height // spec.vae_scale_factor, width // spec.vae_scale_factor)

    def prepare(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Latents as sent to what the VAE takes. A family that packs what it has scaled overrides the order."""
        return self.unscale(self.unpack(latents, geometry), spec, scaling)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Undo the pipeline's packing and add a missing batch axis.

        latents: as sent -> `geometry.latent_shape`.
        """
        return latents.reshape(geometry.latent_shape)

    def unscale(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Undo the training-time scaling, as the pipelines do before `vae.decode`; any shape, channels on axis 1.

        Sent factors win. A `shift_factor` sent alone replaces the model's.
        """
        if scaling.factor is not None:
            return latents / scaling.factor + (scaling.shift or 0.0)
        if not scaling.from_model:
            return latents + scaling.shift if scaling.shift is not None else latents
        factor = spec.scaling_factor or 1.0
        if scaling.shift is None and spec.latents_mean is not None and spec.latents_std is not None:
            return latents * _per_channel(spec.latents_std, latents) / factor + _per_channel(spec.latents_mean, latents)
        shift = scaling.shift if scaling.shift is not None else spec.shift_factor
        return latents / factor + (shift or 0.0)


def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(values).reshape(1, -1, *[1] * (like.ndim - 2))  # [C] -> [1, C, 1, 1(, 1)]


def times(shape: tuple[int, ...]) -> str:
    """A shape as people write it: `1x4x64x64`."""
    return "x".join(map(str, shape))


def check_limits(geometry: Geometry, limits: Limits, model: str) -> None:
    """Refuse what is larger than the model's limits.

    Raises TooLarge; Impossible where no pixel would come out.
    """
    height, width = geometry.height, geometry.width
    if height * width > limits.max_pixels:
        raise TooLarge(
            f"{height}x{width} is {height * width} pixels, '{model}' decodes at most {limits.max_pixels}; "
            "send a smaller picture or raise max_pixels in models.yaml"
        )
    if geometry.num_frames > limits.max_frames:
        raise TooLarge(
            f"{geometry.num_frames} frames, '{model}' decodes at most {limits.max_frames}; "
            "send a shorter clip or raise max_frames in models.yaml"
        )
    if geometry.batch > limits.max_batch:
        raise TooLarge(
            f"a batch of {geometry.batch}, '{model}' decodes at most {limits.max_batch} at once; "
            "send fewer latents per request or raise max_batch in models.yaml"
        )
    if 0 in geometry.latent_shape:
        raise Impossible(f"latents {times(geometry.latent_shape)} are empty; every dimension must be at least 1")


def wrong_channels(spec: LatentSpec, found: int, expected_shape: str) -> WrongShape:
    """The error of latents made for another model."""
    return WrongShape(
        f"the latents have {found} channels, this model's have {spec.channels} ({expected_shape}); "
        "were they made for another model? GET /models lists each model's channels"
    )
