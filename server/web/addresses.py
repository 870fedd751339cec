"""Compare host names and addresses from headers and settings."""

from __future__ import annotations

import ipaddress

from ..config import ServerOptions


def plain(name: str) -> str:
    """Return a host name or an address in lower case, without brackets and without a dot at its end."""
    return name.strip().strip("[]").rstrip(".").lower()


def is_address(name: str) -> bool:
    """Return whether a name is an IP address. name: as `plain` returns it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Return whether a name is localhost or a loopback address. name: as `plain` returns it."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def is_local(options: ServerOptions) -> bool:
    """Return whether the server listens on a loopback address, which only this machine can reach."""
    return is_loopback(plain(options.host))
