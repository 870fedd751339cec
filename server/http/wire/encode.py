"""The query and `Accept` of an encode to all of a VAERequest but its bytes: those of a tensor, a picture or a clip."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from server.errors import BadRequest, Impossible, TooLarge, UnsupportedBody, WrongShape
from server.families import FAMILIES, check_limits
from server.families.base import times
from server.http.wire.formats import choose_format
from server.http.wire.parameters import Parameters
from server.http.wire.tensors import check_length
from server.inputs import VIDEO_TYPE, Header, media_type_of, read_file, read_header, resized
from server.types import (
    LATENT_DTYPES,
    Geometry,
    Kind,
    LatentSpec,
    Layout,
    ModelInfo,
    Operation,
    RawTensor,
    RenderOptions,
    Scaling,
    VAEJob,
    VAERequest,
)

PIXEL_DTYPES = ("uint8", *LATENT_DTYPES)
RGB, RGBA = 3, 4
MOST_PIXEL_BYTES = 1 << 30
# The axes of the tensors that are understood, by rank, the likeliest first: what diffusers' image and video processors
# take, what a VAE takes, and what this server answers with `partial_postprocess`.
ORDERS: dict[Kind, dict[int, tuple[str, ...]]] = {
    "image": {3: ("CHW", "HWC"), 4: ("BCHW", "BHWC")},
    "video": {4: ("FCHW", "CFHW", "FHWC"), 5: ("BCFHW", "BFCHW", "BFHWC")},
}


@dataclass(frozen=True, slots=True)
class PreparedPixels:
    """An encode that is accepted but for its bytes. order: the axes of `shape`, a letter each."""

    model: str
    shape: tuple[int, ...]
    dtype: str
    order: str
    geometry: Geometry
    scaling: Scaling
    seed: int | None
    output_dtype: str | None
    format: str
    media_type: str

    @property
    def bytes_needed(self) -> int:
        return RawTensor.bytes_needed(self.shape, self.dtype)

    @property
    def bytes_held(self) -> int:
        """Of the request and, at most, its answer."""
        return self.bytes_needed + RawTensor.bytes_needed(self.geometry.latent_shape, "float32")

    def fitted(self) -> PreparedPixels:
        """With the pixels already of the geometry's size."""
        sizes = {"H": self.geometry.height, "W": self.geometry.width}
        return replace(self, shape=tuple(map(lambda a, n: sizes.get(a, n), self.order, self.shape)))

    def check_length(self, found: int) -> None:
        """Raises WrongLength."""
        check_length(self.shape, self.dtype, found, PIXEL_DTYPES)

    def with_data(self, data: bytes | bytearray | memoryview) -> VAERequest:
        """Raises WrongLength."""
        self.check_length(len(data))
        job = VAEJob(
            model=self.model,
            tensor=RawTensor(self.shape, self.dtype, memoryview(data)),
            geometry=self.geometry,
            scaling=self.scaling,
            layout=Layout.SAMPLE,
            operation=Operation.ENCODE,
            order=self.order,
            seed=self.seed,
            output_dtype=self.output_dtype,
        )
        return VAERequest(job, self.format, RenderOptions(fps=1, quality=None, media_type=self.media_type))


def prepare_pixels(parameters: Parameters, accept: str, info: ModelInfo) -> PreparedPixels:
    """For a tensor, whose shape and dtype were sent. Raises BadRequest, WrongShape, TooLarge, Impossible."""
    shape, dtype = parameters.shape(), parameters.dtype(PIXEL_DTYPES, "pixels")
    return _prepared(parameters, accept, info, shape, dtype, _order(shape, info.latents))


def prepare_file(parameters: Parameters, accept: str, info: ModelInfo, shape: tuple[int, ...]) -> PreparedPixels:
    """For the pixels of a picture or a clip, uint8 `[F, H, W, 3]`, before they are fitted to the geometry's size.

    Raises BadRequest, TooLarge, Impossible.
    """
    order = "FHWC" if info.latents.kind == "video" else "BHWC"
    return _prepared(parameters, accept, info, shape, "uint8", order)


def _prepared(
    parameters: Parameters, accept: str, info: ModelInfo, shape: tuple[int, ...], dtype: str, order: str
) -> PreparedPixels:
    chosen, media_type = choose_format(parameters, "pt", accept, info.latents.kind)
    batch, frames, height, width = (dict(zip(order, shape, strict=True)).get(axis, 1) for axis in "BFHW")
    geometry = FAMILIES[info.latents.family].encoded(info.latents, batch, frames, height, width)
    check_limits(geometry, info.limits, info.name)
    seed = _seed(parameters, info.latents)
    return PreparedPixels(
        model=info.name,
        shape=shape,
        dtype=dtype,
        order=order,
        geometry=geometry,
        scaling=parameters.scaling(),
        seed=seed,
        output_dtype=parameters.output_dtype(),
        format=chosen.names[0],
        media_type=media_type,
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
            f"shape {times(shape)} is not pixels of this model; send {what}, RGB; "
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


def file_bytes_held(header: Header, data: bytes | bytearray) -> int:
    """Of a file, and of its pixels as they are decoded and as they are fitted."""
    return len(data) + 2 * header.frames * header.height * header.width * RGBA


def read_pixels(
    parameters: Parameters, accept: str, info: ModelInfo, data: bytes | bytearray, header: Header
) -> VAERequest:
    """A file to its request; takes as long as its pixels take to decode. Raises BadRequest, TooLarge, Impossible."""
    pixels = read_file(data, header, "RGBA" if info.latents.image_channels == RGBA else "RGB")
    prepared = prepare_file(parameters, accept, info, pixels.shape)
    return prepared.fitted().with_data(resized(pixels, prepared.geometry.height, prepared.geometry.width).data)
