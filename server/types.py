"""The values that cross a border between layers. Plain Python: no torch, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Literal, NamedTuple

Kind = Literal["image", "video"]

LATENT_DTYPES = ("float16", "bfloat16", "float32")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}


EXACT = "exact"  # the name of the coders that are our own and keep no state between the steps of their work


class Operation(StrEnum):
    """A VAE's two directions."""

    DECODE = "decode"
    ENCODE = "encode"


class Half(NamedTuple):
    """One direction of a model: what is loaded, and waited for, by itself."""

    model: str
    operation: Operation = Operation.DECODE


class Layout(StrEnum):
    """What a decode leaves on the device, before it is rendered to bytes.

    SAMPLE: what `vae.decode` returns, about [-1, 1], in the model's dtype, `[B, C, H, W]` or `[B, C, F, H, W]`.
    UNIT: denormalized to [0, 1] and clamped, `[N, C, H, W]`; float32 of a float32 model, else float16, which keeps
        more of [0, 1] than bfloat16 does. N counts the pictures of a batch, or the frames of a clip.
    PIXELS: `round(255 x)` of the denormalized sample in float32, uint8, channels last: `[N, H, W, C]`.
    """

    SAMPLE = "sample"
    UNIT = "unit"
    PIXELS = "pixels"


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes: C order, little endian. `data.nbytes == prod(shape) * itemsize`."""

    shape: tuple[int, ...]
    dtype: str
    data: memoryview

    @staticmethod
    def bytes_needed(shape: tuple[int, ...], dtype: str) -> int:
        """How many bytes a tensor of this shape and dtype has."""
        return prod(shape) * ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How to unscale: with `factor` and `shift` as sent, else with the model's own statistics, else not at all."""

    factor: float | None = None
    shift: float | None = None
    from_model: bool = False


@dataclass(frozen=True)  # without slots: config.py reads the defaults off the class
class Limits:
    """The largest request a model takes. `max_pixels` counts one picture or one frame."""

    max_pixels: int = 16_777_216
    max_frames: int = 257
    max_batch: int = 8


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a VAE's config.json says of its latents; the statistics are those of `pipeline.vae.config`.

    patch_size: of packed latents, in latent pixels. image_channels: 4 where pictures have an alpha channel.
    has_posterior: encoding gives a distribution, whose mode is the answer unless a sample is asked for.
    takes_timestep: decoding takes `decode_timestep`. inverts_scale: encoding divides by the scaling factor.
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
    takes_timestep: bool = False
    inverts_scale: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """One request's sizes: the latents and the pixels.

    `latent_shape` is what the VAE takes or gives, `[B, C, H, W]` or `[B, C, F, H, W]`; `height` and `width` are in
    pixels. axes: the order of a clip's axes as sent. skipped_frames: latent frames ahead of the clip. arguments: of
    `vae.decode` beside the latents.
    """

    latent_shape: tuple[int, ...]
    is_packed: bool
    num_frames: int
    height: int
    width: int
    axes: str = "BCFHW"
    skipped_frames: int = 0
    arguments: tuple[tuple[str, float], ...] = ()

    @property
    def batch(self) -> int:
        return self.latent_shape[0]

    @property
    def key(self) -> tuple[object, ...]:
        """What requests that run together share."""
        return self.latent_shape, self.num_frames, self.height, self.width, self.arguments

    @property
    def size_text(self) -> str:
        """`HEIGHTxWIDTH`, or `BATCHxFRAMESxHEIGHTxWIDTH` where there is more than one image."""
        count = f"{self.batch}x{self.num_frames}x" if self.batch * self.num_frames > 1 else ""
        return f"{count}{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """Of all pictures and frames."""
        return self.batch * self.num_frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model takes. disk_mb: of what is not here at most. decoder_mb, encoder_mb: in memory, in `dtype`."""

    is_here: bool
    dtype: str
    disk_mb: int | None = None
    decoder_mb: int | None = None
    encoder_mb: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What `GET /models` tells of one model, and what a request is checked against.

    is_assumed: said by the list of well-known checkpoints, not by a config.json that is here.
    """

    name: str
    latents: LatentSpec
    limits: Limits
    class_name: str
    is_assumed: bool = False
    licence: str | None = None
    is_gated: bool = False
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class LoadedInfo:
    """What is known of a model only once its weights are on a device.

    decoder, encoder: how each direction runs, None while its weights are not loaded. note: why it is diffusers' own.
    """

    device: str
    dtype: str
    decoder: str | None = None
    encoder: str | None = None
    note: str | None = None

    def runs(self, operation: Operation) -> bool:
        return self._coder(operation) is not None

    def may_run_inside_itself(self, operation: Operation) -> bool:
        """Whether a job of this direction may run between the steps of another one of it."""
        return self._coder(operation) == EXACT

    def _coder(self, operation: Operation) -> str | None:
        return self.encoder if operation is Operation.ENCODE else self.decoder


@dataclass(frozen=True, slots=True)
class VAEJob:
    """What an engine needs to decode or encode.

    tensor: latents, or pixels, uint8 or float in [-1, 1]. order: the pixels' axes, a letter of BCFHW each.
    seed: draws a sample of the posterior; None answers its mode. output_dtype: the dtype of a float answer; None is
    float16 for samples that were computed in half precision, and otherwise the dtype that they were computed in.
    """

    model: str
    tensor: RawTensor
    geometry: Geometry
    scaling: Scaling
    layout: Layout
    operation: Operation = Operation.DECODE
    order: str = ""
    seed: int | None = None
    output_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """What comes off the device.

    device_ms: the device's time, from the bytes in to the bytes out, of the whole batch.
    oom_steps: what was done about a lack of memory. is_upcast: done in float32, because half precision overflowed.
    """

    tensor: RawTensor
    device_ms: float
    batch_size: int = 1
    oom_steps: tuple[str, ...] = ()
    is_upcast: bool = False


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How to render. `quality` is the format's own scale: 1 to 100 for a JPEG, 1 to 10 for an MP4."""

    fps: float
    quality: float | None
    media_type: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer's body and the headers that describe it."""

    body: memoryview
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """What an engine answers a request with."""

    rendered: Rendered
    device_ms: float
    render_ms: float
    batch_size: int = 1
    oom_steps: tuple[str, ...] = ()
    is_upcast: bool = False


@dataclass(frozen=True, slots=True)
class VAERequest:
    """One request, wholly understood: nobody behind the wire sees a client's flag again."""

    job: VAEJob
    format: str
    render: RenderOptions
