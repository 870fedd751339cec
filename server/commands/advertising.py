"""Advertise the server on the local network with `serve --advertise`, so that clients find it without its address.

This is DNS-based service discovery over multicast DNS (RFC 6763, RFC 6762). The package zeroconf speaks it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from contextlib import suppress

import psutil

from .. import __version__
from ..config import Settings
from ..errors import ConfigError
from ..web.addresses import is_loopback, plain

log = logging.getLogger(__name__)

SERVICE_TYPE = "_vae-server._tcp.local."
LONGEST_NAME = 50  # bytes of the machine's name; DNS allows 63, and numbers are appended


class Advertisement:
    """What the local network is told about one server.

    The record has a name such as `box-8000`, made of the machine's name and the port, and the addresses. It also has
    `path` (of the default model), `tls` and `key` (1 if HTTPS or an API key is needed, else 0), `version`, and `host`
    if `--allowed-hosts` is set: a name or an address from it, which clients must use in place of the addresses. It
    never has an API key.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        """Make the record without publishing it.

        listener: the socket on which the server listens.

        Raises ConfigError if the package zeroconf is not installed, or if the listener has no address, or
        `--allowed-hosts` no name, that other machines can use.
        """
        try:
            from zeroconf import InterfaceChoice
            from zeroconf.asyncio import AsyncServiceInfo
        except ModuleNotFoundError:
            raise ConfigError(
                "--advertise needs the package zeroconf; run: pip install zeroconf (it is the extra `advertise`)"
            ) from None
        host, port = listener.getsockname()[:2]
        is_everywhere = host in ("0.0.0.0", "::")  # noqa: S104  # it is compared
        self._interfaces = InterfaceChoice.All if is_everywhere else [host]
        if is_loopback(host):
            log.warning(
                "--advertise: the server listens on %s, so that only programs of this machine can find it; for other "
                "machines, start it with --host 0.0.0.0 and with --api-key-file",
                host,
            )
        options = settings.options
        told = {
            "path": "/",
            "tls": str(int(options.tls_cert is not None)),
            "key": str(int(bool(settings.api_keys))),
            "version": __version__,
        }
        if name := name_for_clients(options.allowed_hosts, is_loopback(host)):
            told["host"] = name
        machine = socket.gethostname().partition(".")[0].encode()[:LONGEST_NAME].decode(errors="ignore") or "server"
        self._info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{machine}-{port}.{SERVICE_TYPE}",
            port=port,
            properties=told,
            server=f"vae-server-{secrets.token_hex(8)}.local.",  # the machine's own name may be published by others
            parsed_addresses=addresses_of(listener),
        )
        self._publishing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to publish the record. Must be called in the event loop."""
        self._publishing = asyncio.create_task(self._publish())

    async def end(self) -> None:
        """Tell the network that the server is gone."""
        if self._publishing is not None:
            self._publishing.cancel()
            with suppress(asyncio.CancelledError):
                await self._publishing

    async def _publish(self) -> None:
        """Publish the record until this is cancelled. An error of the network is only logged; the server goes on."""
        from zeroconf import Error
        from zeroconf.asyncio import AsyncZeroconf

        try:
            # Closing it withdraws the record.
            async with AsyncZeroconf(self._interfaces) as network:
                await (await network.async_register_service(self._info, allow_name_change=True))
                log.info("advertised on the local network as %s", self._info.name)
                await asyncio.Event().wait()
        except (OSError, Error) as error:
            log.warning("the server is not advertised on the local network (%s: %s)", type(error).__name__, error)


def name_for_clients(allowed_hosts: str | None, is_local: bool) -> str | None:
    """Return the first name of `--allowed-hosts` that clients can use, or None if they can use the server's addresses.

    is_local: the server listens on a loopback address, so that its clients are on this machine.

    Raises ConfigError if other machines can use none of the names.
    """
    allowed = [plain(name) for name in (allowed_hosts or "").split(",") if name.strip()]
    if allowed_hosts is None or "*" in allowed:
        return None
    names = [name for name in allowed if is_local or not is_loopback(name)]
    if not names and not is_local:
        raise ConfigError(
            f"--advertise needs a name that other machines can use, but --allowed-hosts is {allowed_hosts!r}; add the "
            "name or the IP address of this machine to --allowed-hosts"
        )
    return names[0] if names else None


def addresses_of(listener: socket.socket) -> list[str]:
    """Return the IP addresses at which clients reach a listening socket, IPv4 first.

    A socket on all interfaces has those of this machine, except loopback addresses unless there are no others. An IPv6
    socket takes IPv4 connections too if the system allows it. Link-local IPv6 addresses are left out, because they mean
    nothing without the name of the client's interface.

    Raises ConfigError if there is none.
    """
    host, families = listener.getsockname()[0], {listener.family}
    if host in ("0.0.0.0", "::"):  # noqa: S104  # it is compared
        if host == "::" and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            families.add(socket.AF_INET)
        interfaces = psutil.net_if_addrs().values()
        known = [each.address for addresses in interfaces for each in addresses if each.family in families]
    else:
        known = [host]
    usable = [address for address in known if not is_link_local(address)]
    usable.sort(key=lambda address: ":" in address)
    if not usable:
        raise ConfigError(
            f"--advertise: the server listens on {host}, and other machines can use no such address (a link-local one "
            "needs the name of an interface); choose another --host"
        )
    return [address for address in usable if not is_loopback(address)] or usable


def is_link_local(address: str) -> bool:
    """Return whether this is an IPv6 address that needs the name of an interface."""
    found = ipaddress.ip_address(address)
    return found.version == 6 and found.is_link_local
