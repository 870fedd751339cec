"""The interface of a VAE family: the layout, packing and scaling of its latents, and how diffusers runs its VAE.

Nothing here depends on HTTP. The arithmetic uses only methods of tensors, so that importing this package does not
import torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import Impossible, TooLarge, WrongChannels, WrongShape
from ..model_info import Kind, LatentSpec, Limits
from ..values import Geometry, Scaling

if TYPE_CHECKING:
    import torch


class Sent(Protocol):
    """The parameters that the client sent besides the shape.

    A family reads only those that it needs, because some clients send wrong values for the others. Every method raises
    BadRequest if the value cannot be parsed.
    """

    def pixel_size(self) -> tuple[int, int] | None:
        """Return height and width in pixels, or None unless both were sent."""
        ...

    def integer(self, key: str) -> int | None:
        """Return the integer sent as `key`, or None."""
        ...

    def long(self, key: str) -> int | None:
        """Return the integer from 0 to 2**64 - 1 sent as `key`, or None."""
        ...

    def number(self, key: str, low: float, high: float) -> float | None:
        """Return the number sent as `key`, or None. Raises BadRequest if it is not in [low, high]."""
        ...


class Family(ABC):
    """A group of VAEs whose latents have the same layout and scaling. Subclasses set these attributes.

    name: the name that `family` has in models.yaml.
    kind: whether the latents decode to images, videos or audio.
    class_names: the diffusers classes, as `_class_name` in a config.json names them.
    channels_key: the key of config.json that holds the number of latent channels.
    is_usually_packed: the latents of the pipelines are packed, `[B, S, D]`.
    has_posterior: encoding returns a distribution; otherwise it returns latents.
    patch_size: side of a packed patch, in latent pixels.
    is_scaled_in_comfyui: the latents that ComfyUI gives to its VAE, and saves in .latent files, are scaled. For most
        families, `latent_format.process_out` of ComfyUI has unscaled them.
    takes_batches: diffusers' own decode and encode can run several images or videos together.
    gpu_dtype: the dtype that `dtype: auto` means on a GPU.
    companion: the component of the pipeline without which the VAE cannot decode. It is loaded from the folder of this
        name beside that of the VAE, and becomes an attribute of the VAE; None if the VAE needs none.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    class_names: ClassVar[tuple[str, ...]]
    channels_key: ClassVar[str] = "latent_channels"
    is_usually_packed: ClassVar[bool] = False
    has_posterior: ClassVar[bool] = True
    patch_size: ClassVar[int] = 2
    is_scaled_in_comfyui: ClassVar[bool] = False
    takes_batches: ClassVar[bool] = True
    gpu_dtype: ClassVar[str] = "float16"
    companion: ClassVar[str | None] = None

    @abstractmethod
    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the spatial and the temporal compression ratio of a VAE with this config.json."""

    @abstractmethod
    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Return the sizes of latents that were sent in this shape.

        sent: the other parameters of the request. Raises WrongShape, WrongChannels, or what `sent` raises.
        """

    @abstractmethod
    def encode_geometry(self, spec: LatentSpec, batch: int, frames: int, height: int, width: int) -> Geometry:
        """Return the sizes for encoding `batch` images, or videos of `frames` frames.

        Height and width are in pixels and are rounded down to multiples of `grid`. Raises Impossible, WrongShape.
        """

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Return the description of a VAE.

        config: its config.json, completed by the defaults of the diffusers class, with the config of `companion`, if
            there is one, under its name.
        """
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
        """Return the spec with the statistics that are stored among the weights, if the family stores them there.

        vae: the loaded diffusers module.
        """
        return spec

    def grid(self, spec: LatentSpec) -> int:
        """Return the number of pixels to a multiple of which heights and widths are rounded down for encoding."""
        return spec.vae_scale_factor

    def latent_shape(self, spec: LatentSpec, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one image, or of a video of one frame, of height x width pixels."""
        frames = (1,) if spec.kind == "video" else ()
        return (1, spec.channels, *frames, height // spec.vae_scale_factor, width // spec.vae_scale_factor)

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Return latents as the VAE takes them: unpack the latents that were sent, then unscale them.

        A family whose pipeline scales latents before it packs them overrides this.
        """
        return self.unscale(self.unpack(latents, geometry), spec, scaling)

    def comfyui_latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry) -> torch.Tensor:
        """Return the latents of a ComfyUI .latent file as the VAE takes them.

        A family whose pipeline orders or scales them in another way than ComfyUI overrides this.
        """
        return self.latents_in(latents, spec, geometry, Scaling(from_model=self.is_scaled_in_comfyui))

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Run diffusers' own decode as the pipelines call it.

        Returns the sample `[B, C, (F,) H, W]`, or the waveform `[B, C, samples]`.

        latents: as `latents_in` returns them. arguments: `Geometry.arguments`, with a torch `generator` in place of a
            `seed`.
        """
        sample: torch.Tensor = vae.decode(latents, return_dict=False, **arguments)[0]
        return sample

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Run diffusers' own encode. Return the posterior's parameters, or latents for a VAE without a posterior.

        pixels: `[B, C, (F,) H, W]` in [-1, 1]; C is 3, or 4 with an alpha channel.
        """
        encoded = vae.encode(pixels, return_dict=False)[0]
        parameters: torch.Tensor = getattr(encoded, "parameters", encoded)
        return parameters

    def latents_out(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Return encoded latents as the client gets them: in the pipelines' layout, scaled if `scaling` says so."""
        return self.scale(latents, spec, scaling)

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Undo the pipeline's packing and add a missing batch axis.

        latents: as the client sent them. Returns a tensor of the shape `geometry.latent_shape`.
        """
        return latents.reshape(geometry.latent_shape)

    def unscale(self, latents: torch.Tensor, spec: LatentSpec, scaling: Scaling) -> torch.Tensor:
        """Undo the training-time scaling, as the pipelines do before `vae.decode`.

        latents: of any shape with the channels on axis 1.
        scaling: if the client sent a factor, only the values that it sent are used. A shift sent without a factor
            replaces that of the model; without `from_model`, it is only added.
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
        """Apply the training-time scaling, as the pipelines do after `vae.encode`: the inverse of `unscale`."""
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
    """Round pixels down to a multiple of `grid`, as diffusers' image processor does.

    name: "height" or "width", for the error. Raises Impossible if nothing would be left.
    """
    if pixels < grid:
        raise Impossible(
            f"a {name} of {pixels} pixels is less than this model's minimum of {grid} pixels; send a larger one"
        )
    return pixels - pixels % grid


def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Return values for each channel, or for each channel and latent frame, shaped to broadcast with `like`."""
    channels = like.shape[1]
    if len(values) == channels:
        return like.new_tensor(values).reshape(1, -1, *[1] * (like.ndim - 2))  # [C] -> [1, C, 1, 1(, 1)]
    return like.new_tensor(values).reshape(1, channels, -1, 1, 1)[:, :, : like.shape[2]]  # [C F] -> [1, C, F, 1, 1]


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text: `1x4x64x64`."""
    return "x".join(map(str, shape))


def check_limits(geometry: Geometry, limits: Limits, model: str, sampling_rate: int | None = None) -> None:
    """Check a request against the limits of a model.

    model: its name, for the error. sampling_rate: of audio, whose length is limited in seconds; None for images and
    videos. Raises TooLarge if a limit is exceeded, Impossible if the latents are empty.
    """
    if sampling_rate and geometry.num_frames > limits.max_seconds * sampling_rate:
        seconds = math.ceil(100 * geometry.num_frames / sampling_rate) / 100
        raise TooLarge(
            f"the latents are {seconds:g} seconds of audio, but '{model}' takes at most {limits.max_seconds}; "
            "send a shorter part",
            operator_task="raise max_seconds in models.yaml",
        )
    height, width = geometry.height, geometry.width
    if height * width > limits.max_pixels:
        raise TooLarge(
            f"{height}x{width} is {height * width} pixels, but '{model}' takes at most {limits.max_pixels}; "
            "send a smaller image",
            operator_task="raise max_pixels in models.yaml",
        )
    if not sampling_rate and geometry.num_frames > limits.max_frames:
        raise TooLarge(
            f"the request has {geometry.num_frames} frames, but '{model}' takes at most {limits.max_frames}; "
            "send a shorter video",
            operator_task="raise max_frames in models.yaml",
        )
    if geometry.batch > limits.max_batch:
        raise TooLarge(
            f"the request has a batch of {geometry.batch}, but '{model}' takes at most {limits.max_batch} at once; "
            "send fewer per request",
            operator_task="raise max_batch in models.yaml",
        )
    if 0 in geometry.latent_shape:
        raise Impossible(f"latents {shape_text(geometry.latent_shape)} are empty; every dimension must be at least 1")


def channels_last(spec: LatentSpec, shape: tuple[int, ...], axes: str) -> WrongShape | None:
    """Return the error for latents with the channels last, or None if the shape does not look like that.

    axes: the axes that the client should send, one letter each, such as "BCHW".
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
    """Return the right shape as text if `shape` has one axis of size 1 too many, else None.

    axes: how many axes the right shape has. channels: the size of its second axis.
    """
    if len(shape) != axes + 1:
        return None
    without = [shape[:axis] + shape[axis + 1 :] for axis, size in enumerate(shape) if size == 1]
    return next((shape_text(each) for each in without if each[1] == channels), None)


def wrong_channels(spec: LatentSpec, found: int, expected_shape: str) -> WrongChannels:
    """Return the error for latents with the channels of another model. found: how many channels they have."""
    return WrongChannels(
        f"the latents have {found} channels, but this model's have {spec.channels} ({expected_shape}); "
        "were they made for another model? GET /models lists each model's channels"
    )
