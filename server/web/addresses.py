"""Host names and addresses, as they stand in headers and settings."""

from __future__ import annotations

import ipaddress

from ..config import ServerOptions


def plain(name: str) -> str:
    """Return a name or an address without brackets, a dot at its end, or capitals."""
    return name.strip().strip("[]").rstrip(".").lower()


def is_address(name: str) -> bool:
    """Return whether it is an IP address. name: plain."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Return whether it is this machine as it calls itself. name: plain."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def is_local(options: ServerOptions) -> bool:
    """Return whether the server listens on this machine only."""
    return is_loopback(plain(options.host))
