"""Advertise the server on the local network with `serve --advertise`, so that clients find it without its address.

This is DNS-based service discovery over multicast DNS (RFC 6763, RFC 6762). The package zeroconf speaks it.
"""

from __future__ import annotations

import asyncio
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
    if `--allowed-hosts` has a name that clients must use in place of the address. It never has an API key.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        """Make the record without publishing it. Raises ConfigError if the package zeroconf is not installed.

        listener: the socket on which the server listens.
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
        allowed = [plain(name) for name in (options.allowed_hosts or "*").split(",")]
        if "*" not in allowed:
            told["host"] = allowed[0]
        machine = socket.gethostname().partition(".")[0].encode()[:LONGEST_NAME].decode(errors="ignore") or "server"
        self._info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{machine}-{port}.{SERVICE_TYPE}",
            port=port,
            properties=told,
            server=f"vae-server-{secrets.token_hex(8)}.local.",  # the machine's own name may be published by others
            parsed_addresses=addresses_of_this_machine() if is_everywhere else [host],
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
        """Publish the record until this is cancelled. An error of the network is logged and ends nothing else."""
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


def addresses_of_this_machine() -> list[str]:
    """Return the IP addresses of this machine that others can reach, IPv4 first; loopback ones if it has no others."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = [each for addresses in psutil.net_if_addrs().values() for each in addresses if each.family in families]
    found.sort(key=lambda each: families.index(each.family))
    known = [each.address for each in found if "%" not in each.address]  # a link-local one needs the interface's name
    return [address for address in known if not is_loopback(address)] or known
