"""Latents in a .safetensors file, and pictures by their file name: what `decode` and `encode` read and write."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, deserialize

from server.errors import ConfigError
from server.outputs import FORMATS
from server.types import RawTensor

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def read_latents(path: Path, key: str | None) -> RawTensor:
    """key: the tensor's name, None for `latents` or the only one. Raises ConfigError."""
    try:
        tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]  # safetensors ships no types for it
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except SafetensorError:
        raise ConfigError(f"{path}: not a safetensors file; write one with safetensors.torch.save_file") from None
    name = key or ("latents" if "latents" in tensors or len(tensors) != 1 else next(iter(tensors)))
    if name not in tensors:
        raise ConfigError(f"{path}: no tensor '{name}'; choose with --key one of {', '.join(tensors) or 'none'}")
    found = tensors[name]
    if found["dtype"] not in DTYPES:
        raise ConfigError(f"{path}: '{name}' is {found['dtype']}; latents are float16, bfloat16 or float32")
    return RawTensor(tuple(found["shape"]), DTYPES[found["dtype"]], memoryview(found["data"]))


def write_latents(latents: RawTensor) -> bytes:
    """A .safetensors file with the tensor `latents`; the library's way to write bytes differs between its versions."""
    name = next(name for name, dtype in DTYPES.items() if dtype == latents.dtype)
    entry = {"dtype": name, "shape": latents.shape, "data_offsets": (0, latents.data.nbytes)}
    header = json.dumps({"latents": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + latents.data


def output_of(path: Path) -> tuple[str, str]:
    """The `Accept` and the `output_type` that give this file. Raises ConfigError."""
    suffix = path.suffix.removeprefix(".").lower()
    encoded = [entry for entry in FORMATS if entry.is_encoded]
    chosen = next((entry for entry in encoded if suffix in entry.names), None)
    if chosen is None:
        known = ", ".join(f".{name}" for entry in encoded for name in entry.names)
        raise ConfigError(f"{path}: '{path.suffix}' is no format this server renders; end the name in {known}")
    return chosen.media_types[0], next(iter(chosen.output_types))
