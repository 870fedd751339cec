"""Turn the parameters and the `Accept` header of a decode into a Job.

Every mistake that can be seen without the tensor is refused here or by the family, before the body is received.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import USUAL_FPS, Settings
from ..errors import Impossible, ServerError, WrongChannels
from ..families import FAMILIES, check_limits
from ..model_info import Direction, Kind, ModelInfo
from ..outputs import OUTPUT_TYPES, STREAMED_MP4, Format, format_named
from ..values import Geometry, Job, Layout, RenderOptions
from .formats import asks_for_stream, choose_format
from .parameters import Parameters

BOTH_ROUTES = "latents are decoded at POST / or /{model}, images encoded there and at POST /encode or /{model}/encode"


@dataclass(frozen=True, slots=True)
class RenderDefaults:
    """The settings of the server that a request may override.

    fps: frames per second of a video. jpeg_quality: 1 to 100. video_quality: 1 to 10.
    """

    fps: float = USUAL_FPS
    jpeg_quality: float = 75
    video_quality: float = 5

    @staticmethod
    def of(settings: Settings, model: str) -> RenderDefaults:
        """Return the settings that apply to a model."""
        options = settings.options
        return RenderDefaults(settings.fps_of(model), options.jpeg_quality, options.video_quality)

    def quality_of(self, kind: Kind) -> float:
        """Return the quality of an answer of this kind. Audio has none."""
        return self.jpeg_quality if kind == "image" else self.video_quality


def decode_job(
    parameters: Parameters, accept: str, info: ModelInfo, defaults: RenderDefaults, others: Iterable[ModelInfo] = ()
) -> Job:
    """Check everything except the bytes of latents to decode, and return the job.

    parameters: must have `shape` and `dtype`.
    accept: the `Accept` header; may be empty.
    info: the model that decodes.
    defaults: used for what the parameters do not say.
    others: models that the error may suggest if the latents do not have the channels of `info`.

    Raises BadRequest, WrongShape, TooLarge, NotAcceptable, Impossible.
    """
    shape, dtype, scaling = parameters.shape(), parameters.dtype(), parameters.scaling()
    usual_type = "wav" if info.latents.kind == "audio" else "pil"
    output_type = parameters.word("output_type", OUTPUT_TYPES) or usual_type
    is_partial = parameters.flag("partial_postprocess")
    geometry = _geometry(parameters, shape, info, others)
    is_still = info.latents.kind == "video" and geometry.num_frames == 1 and output_type == "pil"
    kind: Kind = "image" if is_still else info.latents.kind
    chosen, media_type = choose_format(parameters, output_type, accept, kind)
    if asks_for_stream(parameters, accept):
        chosen = _streamed(chosen)
    check_limits(geometry, info.limits, info.name, info.latents.sampling_rate)
    layout = Layout.SAMPLE if kind == "audio" else _layout(chosen, output_type, is_partial)
    _check_fits(geometry, chosen, layout, kind)
    return Job(
        model=info.name,
        direction=Direction.DECODE,
        shape=shape,
        dtype=dtype,
        geometry=geometry,
        scaling=scaling,
        format=chosen.names[0],
        render=RenderOptions(
            fps=parameters.number("fps", 0.1, 240) or defaults.fps,
            quality=_quality(parameters, chosen, defaults.quality_of(kind)),
            media_type=media_type,
            sampling_rate=info.latents.sampling_rate or 0,
        ),
        layout=layout,
        output_dtype="float32" if kind == "audio" and chosen.is_encoded else parameters.output_dtype(),
    )


def _streamed(chosen: Format) -> Format:
    if "mp4" not in chosen.names:
        raise Impossible(
            "stream=True answers a video as an MP4 in fragments; send output_type=mp4 to a video model, or no stream"
        )
    return format_named(STREAMED_MP4)


def _geometry(parameters: Parameters, shape: tuple[int, ...], info: ModelInfo, others: Iterable[ModelInfo]) -> Geometry:
    """Return the geometry of the latents.

    Raises WrongShape. If only the number of channels is wrong, the error names the models that accept these latents.
    """
    try:
        return FAMILIES[info.latents.family].decode_geometry(info.latents, shape, parameters)
    except WrongChannels as error:
        alike = [other for other in others if (other.latents.kind == "audio") == (info.latents.kind == "audio")]
        fitting = [other.name for other in alike if _fits(parameters, shape, other)]
        if fitting:
            raise WrongChannels(f"{error}; models of this server that accept them: {', '.join(fitting)}") from None
        raise WrongChannels(f"{error}; {BOTH_ROUTES}") from None


def _fits(parameters: Parameters, shape: tuple[int, ...], info: ModelInfo) -> bool:
    """Return whether a model accepts latents of this shape, and is worth suggesting for them."""
    if (
        len(shape) == 4 and info.latents.kind == "video"
    ):  # it accepts them as videos of one frame, which is not what the client meant
        return False
    try:
        FAMILIES[info.latents.family].decode_geometry(info.latents, shape, parameters)
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
    """Raise Impossible if the answer cannot hold the result.

    An encoded answer holds one image or one video, of a size that the format allows. A tensor whose first axis is the
    frames holds one video.
    """
    longest = max(geometry.height, geometry.width)
    if chosen.max_side is not None and longest > chosen.max_side:
        raise Impossible(
            f"{geometry.height}x{geometry.width} does not fit a {chosen.names[0].upper()}, whose sides are at most "
            f"{chosen.max_side} pixels; send output_type=pt"
        )
    if geometry.batch == 1 or (not chosen.is_encoded and (layout is Layout.SAMPLE or kind == "image")):
        return
    what = f"one {chosen.names[0].upper()}" if chosen.is_encoded else "one tensor of frames"
    raise Impossible(
        f"a batch of {geometry.batch} does not fit {what}; send output_type=pt, or a request for each item of the batch"
    )
