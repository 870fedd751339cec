"""Read one tensor from a .safetensors file or a .latent file of ComfyUI, without copying its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from ..values import RawTensor

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "U8": "uint8"}
LENGTH_BYTES = 8
MOST_DIMENSIONS = 5
MOST_HEADER_BYTES = 1 << 20  # large, because ComfyUI writes its whole workflow into the header
NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)  # ValueError: the header is not UTF-8
SOUND = "audio_latents"
COMFYUI_MARKER, COMFYUI_TENSOR = "latent_format_version_0", "latent_tensor"


class FileError(ValueError):
    """A file from which the tensor cannot be read. Its text continues a sentence that begins with the file's name."""


class NoSuchTensor(FileError):
    """A file whose tensors have other names."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One tensor of a file.

    is_from_comfyui: the file is a .latent of ComfyUI, and the tensor its latents.
    has_sound: the file also has the latents of a video's sound, under the name SOUND.
    """

    tensor: RawTensor
    is_from_comfyui: bool
    has_sound: bool = False


Whole = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[Whole], msgspec.Meta(min_length=1, max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[Whole, Whole]


def is_safetensors(data: bytes | bytearray | memoryview) -> bool:
    """Return whether the bytes begin like a safetensors file: with the length of a header, and a JSON object."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    return 2 <= length <= MOST_HEADER_BYTES and bytes(data[LENGTH_BYTES : LENGTH_BYTES + 1]) == b"{"


def read_tensor(data: bytes | bytearray, key: str | None = None) -> TensorFile:
    """Return one tensor of a safetensors file, without copying its bytes.

    key: the name of the tensor. None means ComfyUI's tensor in a .latent file, `latents` in other files, or their only
        tensor.
    Raises NoSuchTensor, or FileError for a damaged file or an unsupported tensor.
    """
    entries, body = _parts(data)
    is_comfyui = COMFYUI_MARKER in entries
    only = next(iter(entries)) if len(entries) == 1 else "latents"
    name = key or (COMFYUI_TENSOR if is_comfyui else "latents" if "latents" in entries else only)
    if name not in entries:
        raise NoSuchTensor(f"has no tensor {name[:40]!a}; it has {_listed(entries)}")
    try:
        entry = msgspec.json.decode(entries[name], type=_Entry)
    except msgspec.ValidationError:
        raise FileError(
            f"has {name[:40]!a} with a shape that latents cannot have; send 1 to {MOST_DIMENSIONS} dimensions"
        ) from None
    except NOT_JSON:
        raise FileError("has a header that is not a safetensors header") from None
    if entry.dtype not in DTYPES:
        raise FileError(f"has {name[:40]!a} as {entry.dtype[:10]!a}; send float16, bfloat16 or float32")
    shape, (start, stop), dtype = tuple(entry.shape), entry.data_offsets, DTYPES[entry.dtype]
    if not start <= stop or RawTensor.bytes_needed(shape, dtype) != stop - start:
        raise FileError("has a header whose shape and offsets disagree; write it again with safetensors")
    if stop > len(body):
        raise FileError(f"is cut short: {name[:40]!a} ends at byte {stop}, and there are {len(body)}; send all of it")
    tensor = RawTensor(shape, dtype, body[start:stop])
    return TensorFile(tensor, is_comfyui and name == COMFYUI_TENSOR, SOUND in entries)


def _parts(data: bytes | bytearray) -> tuple[dict[str, msgspec.Raw], memoryview]:
    """Return the entries of the header, each still as JSON, and the bytes after the header. Raises FileError."""
    if not is_safetensors(data):
        raise FileError("is not a safetensors file; write one with safetensors.torch.save_file")
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    try:
        entries = msgspec.json.decode(data[LENGTH_BYTES:end], type=dict[str, msgspec.Raw])
    except NOT_JSON:
        raise FileError("has a header that is not a safetensors header") from None
    entries.pop("__metadata__", None)
    return entries, memoryview(data)[end:]


def _listed(entries: dict[str, msgspec.Raw]) -> str:
    shown = ", ".join(f"{name[:40]!a}" for name in list(entries)[:5])
    return shown + (" …" if len(entries) > 5 else "") or "none"
