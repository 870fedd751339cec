"""Read the headers of safetensors files: names, dtypes and shapes of the tensors. No tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFE_ONLY = "only safetensors weights are ever loaded, because a pickle file can run code"
SAVE_AGAIN = (
    "save it as safetensors on a machine where you trust it, with save_pretrained or safetensors.torch.save_file"
)

# What files that are not safetensors begin with, and the sentence about each.
LFS_POINTER = b"version https://git-lfs"
BEGINNINGS = {
    LFS_POINTER: "is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder",
    b"PK\x03\x04": f"is a pickle file of torch.save, whatever its name says, and {SAFE_ONLY}; {SAVE_AGAIN}",
    b"\x80": f"is a pickle file, whatever its name says, and {SAFE_ONLY}; {SAVE_AGAIN}",
    b"GGUF": "is a GGUF file, which this server does not read; use the safetensors file of the same VAE",
    b"<": "is a web page, as a failed download leaves it; download the weights again",
}


class UnreadableWeights(ValueError):
    """A file of weights that cannot be used. Its text is the end of a sentence that begins with the model's name."""


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor as the header of a safetensors file describes it.

    dtype: such as `F32`, `BF16` or `F8_E4M3`. data_offsets: its first byte, and the one after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file. metadata: the text that its author stored, by key."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check that the file is complete.

    Raises UnreadableWeights if it is not a whole safetensors file, OSError if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(len(LFS_POINTER))
        length = int.from_bytes(beginning[:LENGTH_BYTES], "little")
        if not size:
            raise UnreadableWeights(f"{path.name} is empty; download it again")
        for start, sentence in BEGINNINGS.items():
            if beginning.startswith(start) and beginning[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
                raise UnreadableWeights(f"{path.name} {sentence}")
        if size < LENGTH_BYTES or beginning[LENGTH_BYTES : LENGTH_BYTES + 1] not in (b"{", b""):
            raise UnreadableWeights(f"{path.name} is not a safetensors file; download it again")
        if length > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
            raise UnreadableWeights(
                f"{path.name} is cut short: its header needs {length} bytes and the file has {size}; download it again"
            )
        file.seek(LENGTH_BYTES)
        text = file.read(length)
    tensors, metadata = _parsed(path, text)
    needed = LENGTH_BYTES + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size < needed:
        raise UnreadableWeights(
            f"{path.name} is cut short: it should have {needed} bytes and has {size}; download it again"
        )
    return Header(path, tensors, metadata)


def _parsed(path: Path, text: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors and the metadata of a header. Raises UnreadableWeights."""
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(entries.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        return {key: msgspec.json.decode(entry, type=StoredTensor) for key, entry in entries.items()}, metadata
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise UnreadableWeights(
            f"{path.name} has a damaged header, so it is not a safetensors file; download it again"
        ) from None
