"""API keys: from the environment and from a file."""

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
    """The name is for the log, which never holds the key."""

    name: str
    key: SecretStr


def read_keys(options: ServerOptions) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    if options.api_key is not None:
        keys += _named_keys(options.api_key.get_secret_value().split(","), "VAE_SERVER_API_KEY")
        if not keys:
            raise ConfigError("VAE_SERVER_API_KEY: is set and empty; unset it for a server without keys")
    if options.api_key_file:
        source = f"--api-key-file {options.api_key_file}"
        try:
            lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source}: is not text in UTF-8") from None
        found = _named_keys(lines, source)
        if not found:
            raise ConfigError(f"{source}: holds no key; put one on each line")
        keys += found
    return tuple(keys)


def _named_keys(entries: Sequence[str], source: str) -> list[ApiKey]:
    """`KEY` or `NAME: KEY`; the space tells a name from a key with a colon. Raises ConfigError, which shows no key."""
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
                raise ConfigError(f"{source}: entry {number}: expected KEY or NAME: KEY; a key has no spaces")
    return keys


def forget_keys() -> None:
    """Take the keys, once they are read, out of the environment, so that no child process inherits them."""
    for name in [name for name in os.environ if name.upper() == "VAE_SERVER_API_KEY"]:
        del os.environ[name]
