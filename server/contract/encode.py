"""Turn the parameters and `Accept` of an encode, and an image or video file, into a Job or a Request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..errors import BadRequest, Impossible, TooLarge, UnsupportedBody, WrongShape
from ..families import FAMILIES, check_limits
from ..families.base import shape_text
from ..inputs import VIDEO_TYPE, Header, media_type_of, read_file, read_header, resized
from ..model_info import Direction, Kind, LatentSpec, ModelInfo
from ..values import PIXEL_DTYPES, Geometry, Job, RenderOptions, Request
from .bodies import Bytes
from .formats import choose_format
from .parameters import Parameters

RGB, RGBA = 3, 4
MOST_PIXEL_BYTES = 1 << 30
# The axes of the tensors that are understood, by rank, the likeliest first: what diffusers' image and video processors
# take, what a VAE takes, and what this server answers with `partial_postprocess`.
ORDERS: dict[Kind, dict[int, tuple[str, ...]]] = {
    "image": {3: ("CHW", "HWC"), 4: ("BCHW", "BHWC")},
    "video": {4: ("FCHW", "CFHW", "FHWC"), 5: ("BCFHW", "BFCHW", "BFHWC")},
}


def encode_job(parameters: Parameters, accept: str, info: ModelInfo) -> Job:
    """Check everything except the bytes of a tensor of pixels, and return the job.

    parameters: must have `shape` and `dtype`. Raises BadRequest, WrongShape, TooLarge, Impossible.
    """
    shape, dtype = parameters.shape(), parameters.dtype(PIXEL_DTYPES, "pixels")
    return _job(parameters, accept, info, shape, dtype, _order(shape, info.latents))


def _job(
    parameters: Parameters, accept: str, info: ModelInfo, shape: tuple[int, ...], dtype: str, pixel_axes: str
) -> Job:
    chosen, media_type = choose_format(parameters, "pt", accept, info.latents.kind)
    batch, frames, height, width = (dict(zip(pixel_axes, shape, strict=True)).get(axis, 1) for axis in "BFHW")
    geometry = FAMILIES[info.latents.family].encode_geometry(info.latents, batch, frames, height, width)
    check_limits(geometry, info.limits, info.name)
    return Job(
        model=info.name,
        direction=Direction.ENCODE,
        shape=shape,
        dtype=dtype,
        geometry=geometry,
        scaling=parameters.scaling(),
        format=chosen.names[0],
        render=RenderOptions(fps=1, quality=None, media_type=media_type),
        pixel_axes=pixel_axes,
        seed=_seed(parameters, info.latents),
        output_dtype=parameters.output_dtype(),
    )


def pixel_order(shape: tuple[int, ...], spec: LatentSpec, colours: Collection[int]) -> str | None:
    """Return which axes these are, a letter each: the one of so many `colours` is C. None when there is none."""
    possible = ORDERS[spec.kind].get(len(shape), ())
    return next((order for order in possible if shape[order.index("C")] in colours), None)


def _order(shape: tuple[int, ...], spec: LatentSpec) -> str:
    """Raises WrongShape."""
    found = pixel_order(shape, spec, {RGB, spec.image_channels})
    if found is None:
        what = "[B, 3, H, W]" if spec.kind == "image" else "[B, 3, F, H, W] or [F, 3, H, W]"
        raise WrongShape(
            f"shape {shape_text(shape)} is not pixels of this model; send {what}, RGB; "
            "latents are decoded at POST / or /{model}"
        )
    return found


def _seed(parameters: Parameters, spec: LatentSpec) -> int | None:
    """`sample=True&seed=N` asks for a sample of the posterior, which must be reproducible. Raises BadRequest."""
    if not parameters.flag("sample"):
        return None
    if not spec.has_posterior:
        raise Impossible("this model's encoder gives latents and no distribution; leave sample out")
    seed = parameters.long("seed")
    if seed is None:
        raise BadRequest("a sample of the posterior needs a seed, a whole number; send it, or leave sample out")
    return seed


def check_encode(parameters: Parameters, accept: str, info: ModelInfo) -> None:
    """What can be said of a file before its body is read. Raises BadRequest, NotAcceptable, Impossible."""
    choose_format(parameters, "pt", accept, info.latents.kind)
    parameters.scaling()
    parameters.output_dtype()
    _rotate(parameters)
    _seed(parameters, info.latents)


def _rotate(parameters: Parameters) -> bool:
    """Whether a file is made upright, as EXIF or the display matrix says."""
    return parameters.flag("rotate", default=True)


def header_of(parameters: Parameters, info: ModelInfo, data: bytes | bytearray) -> Header:
    """Of a picture or a clip that this model takes. Raises BadRequest, UnsupportedBody, TooLarge, Impossible."""
    media_type = media_type_of(data)
    if not data:
        raise BadRequest("the body is empty; send a PNG, JPEG, WebP or MP4, or a tensor's bytes with shape and dtype")
    if media_type is None:
        raise UnsupportedBody(
            "the body is no PNG, JPEG, WebP or MP4; for a tensor's bytes send shape and dtype, for example "
            "shape=1&shape=3&shape=512&shape=512&dtype=uint8"
        )
    if media_type == VIDEO_TYPE and info.latents.kind == "image":
        raise Impossible("this model encodes pictures, the body is a video; send one frame of it as a picture")
    header = read_header(data, media_type, info.limits.max_frames, rotate=_rotate(parameters))
    size = Geometry((1,), is_packed=False, num_frames=header.frames, height=header.height, width=header.width)
    check_limits(size, info.limits, info.name)
    if size.pixels * RGBA > MOST_PIXEL_BYTES:
        raise TooLarge(
            f"{header.frames} frames of {header.height}x{header.width} are more pixels than this server encodes "
            "at once; send a shorter or smaller clip"
        )
    return header


def file_bytes_held(header: Header, data: Bytes) -> int:
    """Return the bytes of a file and of its pixels, once as they are read and once as they are resized."""
    return len(data) + 2 * header.frames * header.height * header.width * RGBA


def read_pixels(
    parameters: Parameters, accept: str, info: ModelInfo, data: bytes | bytearray, header: Header
) -> Request:
    """Decode an image or video file and return the request to encode its pixels. Blocks for as long as that takes.

    The pixels are resized to the nearest size that the model can encode. Raises BadRequest, TooLarge, Impossible.
    """
    pixels = read_file(data, header, "RGBA" if info.latents.image_channels == RGBA else "RGB")
    job = _job(parameters, accept, info, pixels.shape, "uint8", "FHWC" if info.latents.kind == "video" else "BHWC")
    fitted = resized(pixels, job.geometry.height, job.geometry.width)
    return Request(replace(job, shape=fitted.shape), fitted.data)
