"""The query and `Accept` of a decode to all of a VAERequest but its bytes.

Every refusal that needs no tensor happens here or in the family's geometry, before a body is read where possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.config import USUAL_FPS
from server.errors import Impossible, ServerError, WrongChannels
from server.families import FAMILIES, check_limits
from server.http.wire.formats import choose_format
from server.http.wire.parameters import Parameters
from server.http.wire.tensors import check_length
from server.outputs import OUTPUT_TYPES, Format
from server.types import (
    LATENT_DTYPES,
    Geometry,
    Kind,
    Layout,
    ModelInfo,
    RawTensor,
    RenderOptions,
    Scaling,
    VAEJob,
    VAERequest,
)

BOTH_ROUTES = "latents are decoded at POST / or /{model}, images encoded there and at POST /encode or /{model}/encode"

# A pixel's, of three channels: raw samples and denormalized ones may be float32.
OUTPUT_BYTES = {Layout.SAMPLE: 12, Layout.UNIT: 12, Layout.PIXELS: 3}


@dataclass(frozen=True, slots=True)
class RenderDefaults:
    """The server's settings that a request may override."""

    fps: float = USUAL_FPS
    jpeg_quality: float = 75
    video_quality: float = 5

    def quality_of(self, kind: Kind) -> float:
        return self.video_quality if kind == "video" else self.jpeg_quality


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is accepted but for its bytes."""

    model: str
    shape: tuple[int, ...]
    dtype: str
    geometry: Geometry
    scaling: Scaling
    layout: Layout
    output_dtype: str | None
    format: str
    render: RenderOptions

    @property
    def bytes_needed(self) -> int:
        return RawTensor.bytes_needed(self.shape, self.dtype)

    @property
    def bytes_held(self) -> int:
        """Of the request and, at most, its answer."""
        return self.bytes_needed + self.geometry.pixels * OUTPUT_BYTES[self.layout]

    def check_length(self, found: int) -> None:
        """Raises WrongLength."""
        check_length(self.shape, self.dtype, found, LATENT_DTYPES)

    def with_data(self, data: bytes | bytearray | memoryview) -> VAERequest:
        """Raises WrongLength."""
        self.check_length(len(data))
        tensor = RawTensor(self.shape, self.dtype, memoryview(data))
        job = VAEJob(self.model, tensor, self.geometry, self.scaling, self.layout, output_dtype=self.output_dtype)
        return VAERequest(job, self.format, self.render)


def prepare(
    parameters: Parameters, accept: str, info: ModelInfo, defaults: RenderDefaults, others: Iterable[ModelInfo] = ()
) -> Prepared:
    """Check everything but the bytes against the model. others: models that wrong latents may have been made for.

    Raises BadRequest, WrongShape, TooLarge, NotAcceptable, Impossible.
    """
    shape, dtype, scaling = parameters.shape(), parameters.dtype(), parameters.scaling()
    output_type = parameters.word("output_type", OUTPUT_TYPES) or "pil"
    is_partial = parameters.flag("partial_postprocess")
    geometry = _geometry(parameters, shape, info, others)
    is_picture = info.latents.kind == "image" or (geometry.num_frames == 1 and output_type == "pil")
    kind: Kind = "image" if is_picture else "video"
    chosen, media_type = choose_format(parameters, output_type, accept, kind)
    check_limits(geometry, info.limits, info.name)
    layout = _layout(chosen, output_type, is_partial)
    _check_fits(geometry, chosen, layout, kind)
    return Prepared(
        model=info.name,
        shape=shape,
        dtype=dtype,
        geometry=geometry,
        scaling=scaling,
        layout=layout,
        output_dtype=parameters.output_dtype(),
        format=chosen.names[0],
        render=RenderOptions(
            fps=parameters.number("fps", 0.1, 240) or defaults.fps,
            quality=_quality(parameters, chosen, defaults.quality_of(kind)),
            media_type=media_type,
        ),
    )


def _geometry(parameters: Parameters, shape: tuple[int, ...], info: ModelInfo, others: Iterable[ModelInfo]) -> Geometry:
    """Raises WrongShape; of wrong channels it names the models that these latents fit."""
    try:
        return FAMILIES[info.latents.family].geometry(info.latents, shape, parameters)
    except WrongChannels as error:
        fitting = [other.name for other in others if _fits(parameters, shape, other)]
        if fitting:
            raise WrongChannels(f"{error}; of this server's models {', '.join(fitting)} would take them") from None
        raise WrongChannels(f"{error}; {BOTH_ROUTES}") from None


def _fits(parameters: Parameters, shape: tuple[int, ...], info: ModelInfo) -> bool:
    if len(shape) == 4 and info.latents.kind == "video":  # it would, as clips of one frame
        return False
    try:
        FAMILIES[info.latents.family].geometry(info.latents, shape, parameters)
    except ServerError:
        return False
    return True


def _quality(parameters: Parameters, chosen: Format, default: float) -> float | None:
    return chosen.quality and (parameters.number("quality", *chosen.quality) or default)


def _layout(chosen: Format, output_type: str, is_partial: bool) -> Layout:
    if chosen.is_encoded or (output_type == "pt" and is_partial):
        return Layout.PIXELS
    return Layout.UNIT if output_type == "pil" else Layout.SAMPLE


def _check_fits(geometry: Geometry, chosen: Format, layout: Layout, kind: Kind) -> None:
    """One picture or one clip in an encoded answer, of a size it holds; one clip where frames are the first axis."""
    longest = max(geometry.height, geometry.width)
    if chosen.max_side is not None and longest > chosen.max_side:
        raise Impossible(
            f"{geometry.height}x{geometry.width} does not fit a {chosen.names[0].upper()}, whose sides are at most "
            f"{chosen.max_side} pixels; ask for output_type=pt"
        )
    if geometry.batch == 1 or layout is Layout.SAMPLE or (kind == "image" and not chosen.is_encoded):
        return
    what = f"one {chosen.names[0].upper()}" if chosen.is_encoded else "one tensor of frames"
    raise Impossible(
        f"a batch of {geometry.batch} does not fit {what}; ask for output_type=pt, or send one request each"
    )
