"""Read the certificate and the private key with which the server speaks TLS."""

from __future__ import annotations

import ssl

from ..errors import ConfigError
from .options import ServerOptions


def tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """Return the context of the server's TLS; None if it speaks plain HTTP.

    Raises ConfigError unless both files can be read and belong together, or neither is set.
    """
    certificate, key = options.tls_cert, options.tls_key
    if certificate is None:
        if key is not None:
            raise ConfigError("--tls-key: is set without --tls-cert; give the certificate too")
        return None
    for name, file in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            reason = f"{error.strerror}; the user of this process must be able to read it"
            raise ConfigError(f"{name} {file}: {reason}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError, _NeedsPasswordError):
        wrong = "is not a certificate with its key" if key is None else f"and --tls-key {key} do not belong together"
        raise ConfigError(
            f"--tls-cert {certificate}: {wrong}; give PEM files: the certificate, then those of its issuers, and "
            "a key without a password"
        ) from None
    return context


class _NeedsPasswordError(Exception):
    """The key is encrypted. Without this, OpenSSL would ask for a password on the terminal."""


def _no_password() -> str:
    raise _NeedsPasswordError
