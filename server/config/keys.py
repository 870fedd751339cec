"""Read the API keys from the environment and from a file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from ..errors import ConfigError
from .options import ServerOptions

KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}:", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that the server accepts. name: shown in the log, which never contains the key."""

    name: str
    key: SecretStr


def read_keys(options: ServerOptions) -> tuple[ApiKey, ...]:
    """Return the keys of `api_key` and `api_key_file`. Raises ConfigError if one of them is set and has no keys."""
    keys: list[ApiKey] = []
    if options.api_key is not None:
        keys += _named_keys(options.api_key.get_secret_value().split(","), "VAE_SERVER_API_KEY")
        if not keys:
            raise ConfigError("VAE_SERVER_API_KEY: is set but empty; unset it if the server should have no keys")
    if options.api_key_file:
        source = f"--api-key-file {options.api_key_file}"
        try:
            lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source}: is not a text file in UTF-8") from None
        found = _named_keys(lines, source)
        if not found:
            raise ConfigError(f"{source}: contains no key; write one on each line")
        keys += found
    return tuple(keys)


def _named_keys(entries: Sequence[str], source: str) -> list[ApiKey]:
    """Parse entries of the form `KEY` or `NAME: KEY`.

    A space follows the colon of a name, which distinguishes it from a colon in a key. source: for the error.

    Raises ConfigError, whose sentence contains no key.
    """
    keys = []
    for number, entry in enumerate(entries, 1):
        match entry.split():
            case []:
                continue
            case [key] if not KEY_NAME.fullmatch(key):
                keys.append(ApiKey(f"key-{number}", SecretStr(key)))
            case [name, key] if KEY_NAME.fullmatch(name):
                keys.append(ApiKey(name[:-1], SecretStr(key)))
            case _:
                raise ConfigError(f"{source}: entry {number}: expected KEY or NAME: KEY; a key must not contain spaces")
    return keys


def forget_keys() -> None:
    """Remove the keys from the environment after they were read, so that no child process inherits them."""
    for name in [name for name in os.environ if name.upper() == "VAE_SERVER_API_KEY"]:
        del os.environ[name]
