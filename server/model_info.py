"""The values that describe a model, before and after its weights are loaded. Plain Python: no torch, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge

from .errors import Impossible

Kind = Literal["image", "video", "audio"]
"""What a model decodes to."""

EXACT = "exact"
"""The name of this server's own coders that keep no state between the steps of their work."""


class Direction(StrEnum):
    """The two directions of a VAE: decode turns latents into pixels, encode turns pixels into latents."""

    DECODE = "decode"
    ENCODE = "encode"


class CoderId(NamedTuple):
    """One direction of one model. Each is loaded, waited for and unloaded independently of the other."""

    model: str
    direction: Direction = Direction.DECODE


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest request that a model accepts: its `limits` in models.yaml.

    max_pixels: pixel count of one image or one frame.
    max_seconds: length of audio.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True}

    max_pixels: Annotated[int, Ge(64)] = 16_777_216
    max_frames: Annotated[int, Ge(1)] = 257
    max_batch: Annotated[int, Ge(1)] = 8
    max_seconds: Annotated[int, Ge(1)] = 600


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """The latents of a VAE, as its config.json describes them.

    family: name of the family in `server.families` that knows the layout.
    kind: whether the latents decode to images, videos or audio.
    channels: size of the channel axis of unpacked latents.
    vae_scale_factor: pixels per latent along each side of an image.
    temporal_compression_ratio: frames per latent frame; for audio, samples per step of the latents.
    scaling_factor, shift_factor, latents_mean, latents_std: the statistics of `pipeline.vae.config`.
    force_upcast: the VAE must be decoded in float32.
    is_usually_packed: the pipeline's latents are packed, `[B, S, D]`.
    patch_size: side of a packed patch, in latent pixels; for LTX-2's audio, the rows that are packed together.
    image_channels: 3, or 4 for a VAE whose images have an alpha channel; for audio, 1 for mono and 2 for stereo.
    has_posterior: encoding returns a distribution. The answer is its mode unless a sample is requested.
    has_encoder: the model can encode. False for a decoder that is a model of its own.
    takes_timestep: decoding accepts the parameter `decode_timestep`.
    takes_seed: decoding draws noise, and accepts the parameters `seed` and `decode_steps`.
    is_preview: the pixels are only similar to those of another model, which takes the same latents.
    inverts_scale: encoded latents are divided by the scaling factor instead of being multiplied by it.
    sampling_rate: of audio, in samples per second.
    """

    family: str
    kind: Kind
    channels: int
    vae_scale_factor: int
    temporal_compression_ratio: int = 1
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool | None = None
    is_usually_packed: bool = False
    patch_size: int = 2
    image_channels: int = 3
    has_posterior: bool = True
    has_encoder: bool = True
    takes_timestep: bool = False
    takes_seed: bool = False
    is_preview: bool = False
    inverts_scale: bool = False
    sampling_rate: int | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The sizes of a model's weights, in MiB.

    is_here: the files are on this machine.
    dtype: the dtype in which the model will be loaded; None if only the device tells it.
    disk_mb: size on disk; an upper bound while the model is not downloaded.
    decoder_mb, encoder_mb: size in memory of each direction, in `dtype`, or else in float32; None while unknown.
    """

    is_here: bool
    dtype: str | None
    disk_mb: int | None = None
    decoder_mb: int | None = None
    encoder_mb: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model before its weights are loaded. Requests are checked against it.

    is_assumed: the values come from the list of well-known checkpoints, because no config.json is on this machine yet.
    directions: those that the weights are for. A file may contain a decoder without an encoder, or the reverse.
    config: config.json, completed by the defaults of its class, without the entries whose names begin with `_`.
    """

    name: str
    latents: LatentSpec
    limits: Limits
    class_name: str
    is_assumed: bool = False
    licence: str | None = None
    is_gated: bool = False
    weights: Weights | None = None
    directions: tuple[Direction, ...] = tuple(Direction)
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def usual_direction(self) -> Direction:
        """The direction to prepare first: decode, unless the weights are only an encoder."""
        return Direction.DECODE if Direction.DECODE in self.directions else self.directions[0]

    def check_direction(self, direction: Direction) -> None:
        """Raise Impossible if the model, or its weights, are not for this direction."""
        if direction is Direction.ENCODE and not self.latents.has_encoder:
            if self.latents.kind == "audio":
                raise Impossible(
                    f"'{self.name}' is an audio model, and this server decodes audio but does not encode it"
                )
            raise Impossible(
                f"'{self.name}' only decodes, because it is a decoder without an encoder; encode with a model that has "
                "the same latents"
            )
        if direction not in self.directions:
            parts = ("a decoder", "encoder") if direction is Direction.ENCODE else ("an encoder", "decoder")
            raise Impossible(
                f"the weights of '{self.name}' are only {parts[0]}, without the {parts[1]}, so it cannot {direction}; "
                "use another model, which GET /models lists with its directions"
            )


@dataclass(frozen=True, slots=True)
class LoadedInfo:
    """What is known of a model once its weights are on a device.

    decoder, encoder: name of the implementation that runs each direction; None while that direction is not loaded.
    note: the reason why diffusers' own implementation runs, if it does.
    dtype_note: the reason why this dtype was chosen.
    statistics: the statistics of the latents that the VAE keeps among its weights, by the name of the buffer.
    """

    device: str
    dtype: str
    decoder: str | None = None
    encoder: str | None = None
    note: str | None = None
    dtype_note: str = ""
    statistics: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)

    def runs(self, direction: Direction) -> bool:
        """Return whether the weights of this direction are loaded."""
        return self._coder(direction) is not None

    def may_run_inside_itself(self, direction: Direction) -> bool:
        """Return whether a request may run between the steps of another request of the same model and direction."""
        return self._coder(direction) == EXACT

    def _coder(self, direction: Direction) -> str | None:
        return self.encoder if direction is Direction.ENCODE else self.decoder
