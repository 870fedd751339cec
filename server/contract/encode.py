"""Turn the parameters and the `Accept` header of an encode into a Job, and an image or video file into a Request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..errors import BadRequest, Impossible, TooLarge, UnsupportedBody, WrongShape
from ..families import FAMILIES, check_limits
from ..families.base import shape_text
from ..inputs import VIDEO_TYPE, Header, media_type_of, read_file, read_header, resized
from ..model_info import Direction, Kind, LatentSpec, ModelInfo
from ..values import PIXEL_DTYPES, Geometry, Job, RenderOptions, Request, Scaling
from .bodies import Bytes
from .formats import choose_format
from .parameters import Parameters

RGB, RGBA = 3, 4
MOST_PIXEL_BYTES = 1 << 30
# The accepted axes of a tensor of pixels, by kind of model and rank, the most likely first. They are the axes that
# diffusers' image and video processors take, that a VAE takes, and that this server answers with for
# `partial_postprocess`.
ORDERS: dict[Kind, dict[int, tuple[str, ...]]] = {
    "image": {3: ("CHW", "HWC"), 4: ("BCHW", "BHWC")},
    "video": {4: ("FCHW", "CFHW", "FHWC"), 5: ("BCFHW", "BFCHW", "BFHWC")},
    "audio": {},
}


def encode_job(parameters: Parameters, accept: str, info: ModelInfo) -> Job:
    """Check everything except the bytes of a tensor of pixels, and return the job.

    parameters: must have `shape` and `dtype`.
    accept: the `Accept` header; may be empty.
    info: the model that encodes.

    Raises BadRequest, WrongShape, TooLarge, NotAcceptable, Impossible.
    """
    shape, dtype = parameters.shape(), parameters.dtype(PIXEL_DTYPES, "pixels")
    return _job(parameters, accept, info, shape, dtype, _order(shape, info.latents))


def _job(
    parameters: Parameters, accept: str, info: ModelInfo, shape: tuple[int, ...], dtype: str, pixel_axes: str
) -> Job:
    info.check_direction(Direction.ENCODE)
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
        is_posterior=_is_posterior(parameters, info.latents),
        output_dtype=parameters.output_dtype(),
    )


def pixel_order(shape: tuple[int, ...], spec: LatentSpec, colours: Collection[int]) -> str | None:
    """Return the axes of a tensor of pixels, one letter each, such as "BCHW"; None if the shape does not fit.

    colours: the sizes that the axis C may have.
    """
    possible = ORDERS[spec.kind].get(len(shape), ())
    return next((order for order in possible if shape[order.index("C")] in colours), None)


def _order(shape: tuple[int, ...], spec: LatentSpec) -> str:
    """Return the axes of a tensor of pixels, as `pixel_order` does. Raises WrongShape if the shape does not fit."""
    found = pixel_order(shape, spec, {RGB, spec.image_channels})
    if found is None:
        what = "[B, 3, H, W]" if spec.kind == "image" else "[B, 3, F, H, W] or [F, 3, H, W]"
        raise WrongShape(
            f"shape {shape_text(shape)} is not a shape of pixels that this model encodes; send RGB pixels {what}; "
            "latents are decoded at POST / or /{model}"
        )
    return found


def _seed(parameters: Parameters, spec: LatentSpec) -> int | None:
    """Return the seed of `sample=True&seed=N`, which asks for a sample of the posterior; None without `sample`.

    A sample needs a seed, so that it is reproducible. Raises BadRequest, Impossible.
    """
    if not parameters.flag("sample"):
        return None
    if not spec.has_posterior:
        raise Impossible("this model's encoder returns latents, not a distribution to sample from; leave sample out")
    seed = parameters.long("seed")
    if seed is None:
        raise BadRequest("sample=True needs a seed; send seed=N, a whole number, or leave sample out")
    return seed


def _is_posterior(parameters: Parameters, spec: LatentSpec) -> bool:
    """Return whether the parameters of the posterior are requested. Raises BadRequest, Impossible."""
    if not parameters.flag("posterior"):
        return False
    if not spec.has_posterior:
        raise Impossible("this model's encoder returns latents, not a distribution; leave posterior out")
    if parameters.flag("sample") or parameters.scaling() != Scaling():
        raise BadRequest(
            "posterior=True returns the distribution before sampling and scaling; leave sample, do_scaling, "
            "scaling_factor and shift_factor out"
        )
    return True


def check_encode(parameters: Parameters, accept: str, info: ModelInfo) -> None:
    """Check the parameters of an encode of a file, before its body is received.

    Raises BadRequest, NotAcceptable, Impossible.
    """
    info.check_direction(Direction.ENCODE)
    choose_format(parameters, "pt", accept, info.latents.kind)
    parameters.scaling()
    parameters.output_dtype()
    _rotate(parameters)
    _seed(parameters, info.latents)
    _is_posterior(parameters, info.latents)


def _rotate(parameters: Parameters) -> bool:
    """Return whether to turn the pixels of a file upright, as EXIF or the display matrix says. Default: True."""
    return parameters.flag("rotate", default=True)


def header_of(parameters: Parameters, info: ModelInfo, data: bytes | bytearray) -> Header:
    """Return the header of an image or video file, after checking that the model can encode the file.

    data: the whole file. Raises BadRequest, UnsupportedBody, TooLarge, Impossible.
    """
    media_type = media_type_of(data)
    if not data:
        raise BadRequest(
            "the body is empty; send a PNG, JPEG, WebP or MP4 file, or a tensor's bytes with shape and dtype"
        )
    if media_type is None:
        raise UnsupportedBody(
            "the body is not a PNG, JPEG, WebP or MP4 file; for a tensor's bytes send shape and dtype, for example "
            "shape=1&shape=3&shape=512&shape=512&dtype=uint8"
        )
    if media_type == VIDEO_TYPE and info.latents.kind == "image":
        raise Impossible("this model encodes images, but the body is a video; send one of its frames as an image file")
    header = read_header(data, media_type, info.limits.max_frames, rotate=_rotate(parameters))
    size = Geometry((1,), is_packed=False, num_frames=header.frames, height=header.height, width=header.width)
    check_limits(size, info.limits, info.name)
    if size.pixels * RGBA > MOST_PIXEL_BYTES:
        raise TooLarge(
            f"{header.frames} frames of {header.height}x{header.width} are more pixels than this server encodes "
            "at once; send a shorter or smaller video"
        )
    return header


def file_bytes_held(header: Header, data: Bytes) -> int:
    """Return how many bytes an encode of a file holds: the file, its decoded pixels, and its resized pixels."""
    return len(data) + 2 * header.frames * header.height * header.width * RGBA


def read_pixels(
    parameters: Parameters, accept: str, info: ModelInfo, data: bytes | bytearray, header: Header
) -> Request:
    """Read the pixels of an image or video file, and return the request to encode them. Blocks until they are read.

    The pixels are resized to the next lower multiple of the model's grid.

    parameters, accept: as for `encode_job`, but without `shape` and `dtype`.
    data, header: the whole file, and what `header_of` returned for it.

    Raises BadRequest, TooLarge, NotAcceptable, Impossible.
    """
    pixels = read_file(data, header, "RGBA" if info.latents.image_channels == RGBA else "RGB")
    job = _job(parameters, accept, info, pixels.shape, "uint8", "FHWC" if info.latents.kind == "video" else "BHWC")
    fitted = resized(pixels, job.geometry.height, job.geometry.width)
    return Request(replace(job, shape=fitted.shape), fitted.data)
