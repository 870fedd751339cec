"""Read and write the files of the commands `decode` and `encode`, whose suffixes tell their formats."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..inputs.tensor import FileError, NoSuchTensor, TensorFile, read_tensor
from ..outputs import FORMATS

LATENTS_SUFFIXES = (".safetensors", ".sft")  # of the files that `encode` writes


def read_latents(path: Path, key: str | None) -> TensorFile:
    """Return the latents in a .safetensors or .latent file.

    key: the name of the tensor; None for the one that `read_tensor` chooses. Raises ConfigError.
    """
    try:
        return read_tensor(read(path), key)
    except NoSuchTensor as error:
        raise ConfigError(f"{path} {error}; choose one of them with --key") from None
    except FileError as error:
        raise ConfigError(f"{path} {error}") from None


def output_of(path: Path) -> tuple[str, str]:
    """Return the `Accept` header and the `output_type` of a request whose answer is this kind of file.

    Raises ConfigError for an unknown suffix.
    """
    suffix = path.suffix.removeprefix(".").lower()
    encoded = [entry for entry in FORMATS if entry.is_encoded and entry.output_types]
    chosen = next((entry for entry in encoded if suffix in entry.names), None)
    if chosen is None:
        known = ", ".join(f".{name}" for entry in encoded for name in entry.names)
        raise ConfigError(f"{path}: '{path.suffix}' is not a format that this server renders; use one of {known}")
    return chosen.media_types[0], next(iter(chosen.output_types))


def check_latents_suffix(path: Path) -> None:
    """Raise ConfigError unless latents are written to a file with this suffix."""
    if path.suffix.lower() not in LATENTS_SUFFIXES:
        known = " or ".join(LATENTS_SUFFIXES)
        raise ConfigError(f"{path}: '{path.suffix}' is not a format that encode writes; use {known}")


def read(path: Path) -> bytes:
    """Return the content of a file. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def write(path: Path, body: bytes) -> None:
    """Write a file. Raises ConfigError."""
    try:
        path.write_bytes(body)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
