"""Recognize whole files in bodies by their first bytes, and find out whether a request is a decode or an encode."""

from __future__ import annotations

from ..errors import BadRequest, Impossible, ServerError, UnsupportedBody, WrongChannels
from ..families import FAMILIES
from ..inputs import media_type_of
from ..inputs.tensor import SOUND, FileError, NoSuchTensor, is_safetensors, read_tensor
from ..model_info import Direction, ModelInfo
from ..values import Job, RawTensor, Request
from .bodies import Bytes
from .decode import RenderDefaults, decode_job
from .encode import RGB, pixel_order
from .parameters import Parameters

NOT_READ = {
    b"\x93NUMPY": "a NumPy file (.npy)",
    b"PK\x03\x04": "a zip archive (.npz, or a file of torch.save)",
    **{bytes([0x80, version]): "a Python pickle, which can run code" for version in range(2, 6)},
}


def opened(parameters: Parameters, data: bytes | bytearray) -> tuple[Parameters, Bytes]:
    """Return the parameters with the shape and dtype of a safetensors file, and the bytes of its tensor.

    Other parameters and bytes are returned unchanged. The model's family knows whether the tensor of a
    ComfyUI .latent file is scaled, so `do_scaling` is ignored for it.

    Raises BadRequest for a damaged file and for parameters that contradict it, UnsupportedBody for a NumPy, zip or
    pickle file.
    """
    for begin, name in NOT_READ.items():
        if data.startswith(begin):
            raise UnsupportedBody(
                f"the body is {name}, which the server does not read; send a .safetensors file, or the tensor's bytes "
                "(array.tobytes()) with shape and dtype"
            )
    if not is_safetensors(data):
        return parameters, data
    try:
        found = read_tensor(data)
    except NoSuchTensor as error:
        raise BadRequest(f"the .safetensors file {error}; send one with a single tensor, or name it latents") from None
    except FileError as error:
        raise BadRequest(f"the .safetensors file {error}") from None
    tensor = found.tensor
    return parameters.of_tensor(tensor.shape, tensor.dtype, is_from_comfyui=found.is_from_comfyui), tensor.data


def sound_in(data: bytes | bytearray) -> RawTensor | None:
    """Return the latents of the sound that a safetensors file holds beside those of a video; None if there are none.

    Raises BadRequest if they cannot be read.
    """
    if not is_safetensors(data):
        return None
    try:
        return read_tensor(data, SOUND).tensor
    except NoSuchTensor:
        return None
    except FileError as error:
        raise BadRequest(f"the .safetensors file {error}") from None


def sound_job(parameters: Parameters, video: Job, latents: RawTensor, audio: ModelInfo | None) -> Request:
    """Return the request for the sound of a video, whose latents are in the same file.

    parameters: those that were sent. video: the job of the video. latents: what `sound_in` returned. audio: the model
        that decodes the sound; None if the entry of the video's model names none.
    Raises Impossible if the answer cannot hold sound, or what `decode_job` raises, with the name of the tensor.
    """
    if audio is not None and audio.latents.kind != "audio":
        raise Impossible(
            f"'{video.model}' names '{audio.name}' as its audio model, which is none; leave {SOUND} out, or correct "
            "audio in its entry of models.yaml"
        )
    if audio is None:
        raise Impossible(
            f"the file has {SOUND}, but '{video.model}' has no audio model; leave them out, or set audio in its entry "
            "of models.yaml"
        )
    if video.format != "mp4":
        raise Impossible(
            f"the file has {SOUND}, and only a whole MP4 holds sound beside a video; send output_type=mp4 and no "
            "stream, or leave them out"
        )
    if video.scaling.factor is not None or video.scaling.shift is not None:
        raise BadRequest(
            f"scaling_factor and shift_factor hold for one tensor, and the file has latents and {SOUND}; send "
            "do_scaling instead, or unscaled latents"
        )
    try:
        sent = parameters.of_sound(latents.shape, latents.dtype)
        return Request(decode_job(sent, "audio/wav", audio, RenderDefaults()), latents.data)
    except ServerError as error:
        error.name_tensor(SOUND)
        raise


def direction_of(parameters: Parameters, info: ModelInfo, data: Bytes | None, asked: Direction) -> Direction:
    """Return whether a request is a decode or an encode.

    A request to a decode route is an encode if it makes sense only as an encode: if the body is an image or MP4 file,
    or if the tensor has 3 channels and the model's latents have another number of channels.

    data: the body; None if it has not been received yet.
    asked: the direction of the route that the request was sent to.

    Raises BadRequest for a shape that cannot be read, Impossible if the weights are not for this direction.
    """
    is_encode = asked is Direction.ENCODE or _is_for_encoding(parameters, info, data)
    direction = Direction.ENCODE if is_encode else Direction.DECODE
    info.check_direction(direction)
    return direction


def _is_for_encoding(parameters: Parameters, info: ModelInfo, data: Bytes | None) -> bool:
    if not parameters.has("shape"):
        return data is not None and media_type_of(data) is not None
    shape = parameters.shape()
    if info.latents.channels == RGB or pixel_order(shape, info.latents, {RGB}) is None:
        return False
    try:
        FAMILIES[info.latents.family].decode_geometry(info.latents, shape, parameters)
    except WrongChannels:
        return True
    except ServerError:
        return False
    return False
