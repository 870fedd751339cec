"""Byte counts of tensors, in either direction."""

from __future__ import annotations

from server.errors import WrongLength
from server.files import MOST_HEADER_BYTES
from server.types import RawTensor


def check_length(shape: tuple[int, ...], dtype: str, found: int, known: tuple[str, ...]) -> None:
    """Raises WrongLength, with a guess at the mistake. known: the dtypes that could have been meant."""
    needed = RawTensor.bytes_needed(shape, dtype)
    if found == needed:
        return
    others = [name for name in known if RawTensor.bytes_needed(shape, name) == found]
    guess = f"was dtype={' or '.join(others)} meant?" if others else "check shape and dtype"
    if 0 < found - needed <= MOST_HEADER_BYTES:
        guess += "; if the body is a .safetensors file, leave both out"
    sizes = "x".join(map(str, shape))
    raise WrongLength(f"shape {sizes} of {dtype} needs {needed} bytes, the body has {found}; {guess}")
