"""What a VAE family is: how its latents are laid out, packed and scaled, and how diffusers runs it. Knows no HTTP.

The arithmetic is written with tensor methods only, so that reading this package never imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import Impossible, TooLarge, WrongChannels, WrongShape
from ..model_info import Kind, LatentSpec, Limits
from ..values import Geometry, Scaling

if TYPE_CHECKING:
    import torch


class Sent(Protocol):
    """What the client sent beside the shape, read only where a family needs it: some clients send nonsense here.

    Every method raises BadRequest for what cannot be read.
    """

    def pixel_size(self) -> tuple[int, int] | None:
        """Height and width in pixels, None unless both were sent."""
        ...

    def integer(self, key: str) -> int | None: ...

    def number(self, key: str, low: float, high: float) -> float | None: ...


class Family(ABC):
    """One file in this package: subclass, name the diffusers classes, add it to `FAMILIES`."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    class_names: ClassVar[tuple[str, ...]]
    channels_key: ClassVar[str] = "latent_channels"
    is_usually_packed: ClassVar[bool] = False
    has_posterior: ClassVar[bool] = True
    patch_size: ClassVar[int] = 2
    takes_batches: ClassVar[bool] = True
    """Whether diffusers' own decode and encode run several clips together."""
    gpu_dtype: ClassVar[str] = "float16"
    """What `dtype: auto` is on a GPU."""

    @abstractmethod
    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Spatial and temporal compression of a VAE with this config.json."""

    @abstractmethod
    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """The sizes of latents sent in this shape. Raises WrongShape."""

    @abstractmethod
    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """The sizes of pictures or a clip to encode, with the pixels that `grid` leaves. Raises Impossible."""

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read a VAE's whole config: config.json over the diffusers class's own defaults."""
        spatial, temporal = self.scale_factors(config)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        return LatentSpec(
            family=self.name,
            kind=self.kind,
            channels=config[self.channels_key],
            vae_scale_factor=spatial,
            temporal_compression_ratio=temporal,
            scaling_factor=config.get("scaling_factor"),
            shift_factor=config.get("shift_factor"),
            latents_mean=tuple(mean) if mean else None,
            latents_std=tuple(std) if std else None,
            force_upcast=config.get("force_upcast"),
            is_usually_packed=self.is_usually_packed,
            patch_size=self.patch_size,
            has_posterior=self.has_posterior,
        )

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """The spec once the weights are there, for families that keep statistics in them. vae: the diffusers module."""
        return spec

    def grid(self, spec: LatentSpec) -> int:
        """Heights and widths of pictures to encode are multiples of this many pixels, or are made so."""
        return spec.vae_scale_factor

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """What the VAE takes for one picture, or a clip of one frame, of height x width pixels."""
        frames = (1,) if spec.kind == "video" else ()
        return (1, spec.channels, *frames, height // spec.vae_scale_factor, width // spec.vae_scale_factor)

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Latents as sent to what the VAE takes. A family that packs what it has scaled overrides the order."""
        return self.unscale(self.unpack(latents, geometry), spec, scaling)

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: float) -> torch.Tensor:
        """diffusers' own decode, as the pipelines call it. latents: prepared -> sample, `[B, C, (F,) H, W]`.

        arguments: the geometry's.
        """
        sample: torch.Tensor = vae.decode(latents, return_dict=False, **arguments)[0]
        return sample

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """diffusers' own encode. pixels: `[B, 3, (F,) H, W]` in [-1, 1] -> the posterior's parameters, or latents."""
        encoded = vae.encode(pixels, return_dict=False)[0]
        parameters: torch.Tensor = getattr(encoded, "parameters", encoded)
        return parameters

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """What the VAE gives to what is answered: scaled when asked, in the layout of the pipeline's latents."""
        return self.scale(latents, spec, scaling)

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

    def scale(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """The inverse of `unscale`, as the pipelines do after `vae.encode`; any shape, channels on axis 1."""
        if scaling.factor is not None:
            return (latents - (scaling.shift or 0.0)) * scaling.factor
        if not scaling.from_model:
            return latents - scaling.shift if scaling.shift is not None else latents
        factor = spec.scaling_factor or 1.0
        if scaling.shift is None and spec.latents_mean is not None and spec.latents_std is not None:
            mean, std = _per_channel(spec.latents_mean, latents), _per_channel(spec.latents_std, latents)
            return (latents - mean) * factor / std
        shift = scaling.shift if scaling.shift is not None else spec.shift_factor
        return (latents - (shift or 0.0)) * factor


def on_grid(pixels: int, grid: int, name: str) -> int:
    """The next lower multiple, as diffusers' image processor takes it. Raises Impossible."""
    if pixels < grid:
        raise Impossible(f"a {name} of {pixels} pixels is less than the {grid} that this model encodes to one latent")
    return pixels - pixels % grid


def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Values of each channel, or of each channel and latent frame, to `like`'s axes."""
    channels = like.shape[1]
    if len(values) == channels:
        return like.new_tensor(values).reshape(1, -1, *[1] * (like.ndim - 2))  # [C] -> [1, C, 1, 1(, 1)]
    return like.new_tensor(values).reshape(1, channels, -1, 1, 1)[:, :, : like.shape[2]]  # [C F] -> [1, C, F, 1, 1]


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as people write it: `1x4x64x64`."""
    return "x".join(map(str, shape))


def check_limits(geometry: Geometry, limits: Limits, model: str) -> None:
    """Refuse what is larger than the model's limits.

    Raises TooLarge; Impossible where no pixel would come out.
    """
    height, width = geometry.height, geometry.width
    if height * width > limits.max_pixels:
        raise TooLarge(
            f"{height}x{width} is {height * width} pixels, '{model}' takes at most {limits.max_pixels}; "
            "send a smaller image",
            operator_task="raise max_pixels in models.yaml",
        )
    if geometry.num_frames > limits.max_frames:
        raise TooLarge(
            f"{geometry.num_frames} frames, '{model}' takes at most {limits.max_frames}; send a shorter video",
            operator_task="raise max_frames in models.yaml",
        )
    if geometry.batch > limits.max_batch:
        raise TooLarge(
            f"a batch of {geometry.batch}, '{model}' takes at most {limits.max_batch} at once; send fewer per request",
            operator_task="raise max_batch in models.yaml",
        )
    if 0 in geometry.latent_shape:
        raise Impossible(f"latents {shape_text(geometry.latent_shape)} are empty; every dimension must be at least 1")


def channels_last(spec: LatentSpec, shape: tuple[int, ...], axes: str) -> WrongShape | None:
    """Return the error of latents with their channels last, None where they cannot be.

    axes: those to send, a letter each.
    """
    if shape[-1] != spec.channels or spec.channels in shape[:-1]:
        return None
    sent = axes.replace("C", "") + "C"
    order = ", ".join(str(sent.index(axis)) for axis in axes)
    expected = ", ".join(axes).replace("C", str(spec.channels))
    return WrongShape(
        f"latents of shape {shape_text(shape)} look channels-last; send [{expected}], "
        f"in torch latents.permute({order}).contiguous()"
    )


def axis_too_many(shape: tuple[int, ...], axes: int, channels: int) -> str | None:
    """Return the shape that is meant when one axis of 1 is too many, None where none is.

    axes: how many the right shape has. channels: the size of its second axis.
    """
    if len(shape) != axes + 1:
        return None
    without = [shape[:axis] + shape[axis + 1 :] for axis, size in enumerate(shape) if size == 1]
    return next((shape_text(each) for each in without if each[1] == channels), None)


def wrong_channels(spec: LatentSpec, found: int, expected_shape: str) -> WrongChannels:
    """The error of latents made for another model."""
    return WrongChannels(
        f"the latents have {found} channels, this model's have {spec.channels} ({expected_shape}); "
        "were they made for another model? GET /models lists each model's channels"
    )
