"""The values of one request, from the parsed parameters to the answer. Plain Python: no torch, no HTTP.

A request takes these forms: the client's parameters become a `Job`; a job and its bytes are a `Request`; the scheduler
wraps it in a `Pending` and groups those in a `Batch`; a `Result` comes back. `Pending` and `Batch` are in
`scheduling/engines.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Generic, TypeVar

from .model_info import CoderId, Direction

LATENT_DTYPES = ("float16", "bfloat16", "float32")
PIXEL_DTYPES = ("uint8", *LATENT_DTYPES)
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}


class Layout(StrEnum):
    """The form in which a decoder returns its output on the device.

    SAMPLE: what `vae.decode` returns, about [-1, 1], in the model's dtype, `[B, C, H, W]` or `[B, C, F, H, W]`; of
        audio `[B, C, samples]`.
    UNIT: denormalized to [0, 1] and clamped, `[N, C, H, W]`. The dtype is float32 for a float32 model and float16 for
        the others, because float16 represents [0, 1] more precisely than bfloat16. N counts images or frames.
    PIXELS: `round(255 x)` of the denormalized sample, computed in float32, as uint8 `[N, H, W, C]`.
    """

    SAMPLE = "sample"
    UNIT = "unit"
    PIXELS = "pixels"


# The largest size of one pixel of three channels. Samples and denormalized samples may be float32.
PIXEL_BYTES = {Layout.SAMPLE: 12, Layout.UNIT: 12, Layout.PIXELS: 3}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes in C order, little endian. `data.nbytes == prod(shape) * itemsize`."""

    shape: tuple[int, ...]
    dtype: str
    data: memoryview

    @staticmethod
    def bytes_needed(shape: tuple[int, ...], dtype: str) -> int:
        """Return the number of bytes of a tensor of this shape and dtype."""
        return prod(shape) * ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How latents are unscaled before decoding, or scaled after encoding.

    factor, shift: the values that the client sent. They take precedence.
    from_model: use the model's own statistics. If it is False and no factor was sent, latents are not scaled.
    is_from_comfyui: the latents are those of a ComfyUI .latent file, which `Family.comfyui_latents_in` reads. The other
        values are not set then.
    """

    factor: float | None = None
    shift: float | None = None
    from_model: bool = False
    is_from_comfyui: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of one request, in latents and in pixels. Used to decode and to encode.

    Of audio, `num_frames` is the number of samples of each channel, and height and width are 1.

    latent_shape: the shape that the VAE takes or returns, `[B, C, H, W]` or `[B, C, F, H, W]`; of audio `[B, C, L]`,
        and `[B, C, L, M]` with M rows for LTX-2.
    num_frames, height, width: of the pixels; num_frames is 1 for an image model.
    axes: order of the axes of the video or audio latents that were sent.
    skipped_frames: latent frames at the start of the tensor that are not part of the video.
    arguments: further keyword arguments of `vae.decode`; a `seed` stands for its `generator`.
    """

    latent_shape: tuple[int, ...]
    is_packed: bool
    num_frames: int
    height: int
    width: int
    axes: str = "BCFHW"
    skipped_frames: int = 0
    arguments: tuple[tuple[str, int | float], ...] = ()

    @property
    def batch(self) -> int:
        """The number of images or videos."""
        return self.latent_shape[0]

    @property
    def key(self) -> tuple[object, ...]:
        """The part of the geometry that requests must share to run in one batch."""
        return self.latent_shape, self.num_frames, self.height, self.width, self.arguments

    @property
    def size_text(self) -> str:
        """`HEIGHTxWIDTH`, or `BATCHxFRAMESxHEIGHTxWIDTH` for more than one image or frame."""
        count = f"{self.batch}x{self.num_frames}x" if self.batch * self.num_frames > 1 else ""
        return f"{count}{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """The pixel count of all images and frames."""
        return self.batch * self.num_frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How the answer is rendered.

    quality: on the scale of the format: 1 to 100 for JPEG, 1 to 10 for MP4.
    sampling_rate: of audio, in samples per second.
    """

    fps: float
    quality: float | None
    media_type: str
    sampling_rate: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is known of a request except its bytes.

    direction: decode or encode.
    shape, dtype: of the tensor that is sent: latents to decode, or pixels to encode (uint8, or floats in [-1, 1]).
    format: name of the output format in `server.outputs.FORMATS`.
    layout: form of the decoder's output.
    pixel_axes: order of the axes of pixels to encode, one letter of BCFHW each.
    seed: seed for a sample of the posterior; None returns its mode.
    is_posterior: an encode returns the parameters of the posterior.
    output_dtype: dtype of a tensor answer. None means float16 for samples that were computed in half precision, and
        the dtype of the computation otherwise.
    """

    model: str
    direction: Direction
    shape: tuple[int, ...]
    dtype: str
    geometry: Geometry
    scaling: Scaling
    format: str
    render: RenderOptions
    layout: Layout = Layout.SAMPLE
    pixel_axes: str = ""
    seed: int | None = None
    is_posterior: bool = False
    output_dtype: str | None = None

    @property
    def coder(self) -> CoderId:
        """The direction of the model that runs it."""
        return CoderId(self.model, self.direction)

    @property
    def bytes_needed(self) -> int:
        """The length that the tensor must have."""
        return RawTensor.bytes_needed(self.shape, self.dtype)

    @property
    def bytes_held(self) -> int:
        """The bytes of the request and of its largest possible answer."""
        if self.direction is Direction.ENCODE:
            answer_bytes = RawTensor.bytes_needed(self.geometry.latent_shape, "float32")
            return self.bytes_needed + answer_bytes * (2 if self.is_posterior else 1)
        return self.bytes_needed + self.geometry.pixels * PIXEL_BYTES[self.layout]


@dataclass(frozen=True, slots=True)
class Request:
    """A job and its bytes. After `contract/`, no code uses the client's parameters."""

    job: Job
    data: memoryview

    @property
    def tensor(self) -> RawTensor:
        """The latents or pixels that were sent."""
        return RawTensor(self.job.shape, self.job.dtype, self.data)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The body of an answer and the headers that describe it."""

    body: memoryview
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


Body = TypeVar("Body", RawTensor, Rendered)


@dataclass(frozen=True, slots=True)
class Result(Generic[Body]):
    """What became of a request. Each stage fills in its own fields.

    body: the tensor that came off the device; after rendering, the body of the answer.
    device_ms: time on the device, from the first byte copied in to the last byte copied out, for the whole batch,
        without the time that other work had the device in between.
    render_ms: time for rendering after the device was done.
    queue_ms: time from admission until a device began.
    batch_size: number of requests that were computed together.
    oom_steps: the measures that were taken when memory ran out.
    is_upcast: computed in float32, because half precision overflowed.
    """

    body: Body
    device_ms: float
    render_ms: float = 0.0
    queue_ms: float = 0.0
    batch_size: int = 1
    oom_steps: tuple[str, ...] = ()
    is_upcast: bool = False

    def rendered(self, body: Rendered, render_ms: float) -> Result[Rendered]:
        """Return the same result with its rendered body."""
        return Result(body, self.device_ms, render_ms, self.queue_ms, self.batch_size, self.oom_steps, self.is_upcast)


TensorResult = Result[RawTensor]
RenderedResult = Result[Rendered]
