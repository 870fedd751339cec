"""Servers that advertise themselves on the local network (`serve --advertise`), which the package zeroconf finds.

`clients/remote_vae` finds them in the same way. It is installed by itself, as these nodes are, so each has its own
copy.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from .remote import LOOK_S, RemoteError

SERVICE_TYPE = "_vae-server._tcp.local."
LISTEN_S = 2.0
ACCEPT_S = 1.0  # how long a server may take to accept a connection
HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
NO_PACKAGE = "to find servers, install zeroconf in ComfyUI's Python: python -m pip install zeroconf"


def addresses_of(info: Any) -> list[str]:
    """Return the addresses that the server of a zeroconf.ServiceInfo may have; an empty list if it has none.

    The name of the record is used, if it has one, and otherwise all its IP addresses, IPv4 first.
    """
    told = {
        (key or b"").decode(errors="replace"): (value or b"").decode(errors="replace")
        for key, value in info.properties.items()
    }
    scheme = "https" if told.get("tls") == "1" else "http"
    hosts = [told["host"]] if told.get("host") else sorted(info.parsed_addresses(), key=lambda each: ":" in each)
    return [f"{scheme}://{_bracketed(host)}:{info.port}" for host in hosts if info.port and _is_usable(host)]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_usable(host: str) -> bool:
    """Return whether an address can have this host: a name, or an IP address that does not need an interface's name."""
    address = _ip_address(host)
    if address is None:
        return HOST_NAME.fullmatch(host) is not None
    return "%" not in host and not (address.version == 6 and address.is_link_local)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def _is_here(address: str) -> bool | None:
    """Return whether an address is one of this machine; None if nothing there accepts a connection.

    An address with a name is not tried, because the search for the name could take long.
    """
    parts = urlsplit(address)
    if _ip_address(parts.hostname or "") is None:
        return False
    try:
        async with asyncio.timeout(ACCEPT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return None
    writer.close()
    return bool(writer.get_extra_info("sockname")[0] == parts.hostname)  # the system chooses it for both ends


async def _reachable(addresses: list[str]) -> str | None:
    """Return the first of these that accepts a connection, preferably on another machine.

    The address of a server's Docker bridge is often also one of this machine, where something else may listen.
    """
    are_here = await asyncio.gather(*map(_is_here, addresses))
    found = [(is_here, address) for is_here, address in zip(are_here, addresses, strict=True) if is_here is not None]
    return min(found, key=lambda pair: pair[0], default=(None, None))[1]


def browse(interfaces: Sequence[str] | None = None) -> dict[str, str]:
    """Return the addresses of the servers by their names, after it has searched for them for `LISTEN_S`.

    interfaces: IP addresses of this machine, on whose networks to listen; None for all. It may not run in the thread of
    an event loop. A server with several IP addresses has one that accepts a connection from this machine, and is left
    out if there is none. Raises RemoteError without zeroconf, or if the network cannot be used.
    """
    try:
        return asyncio.run(_browse(interfaces))
    except OSError as error:
        raise RemoteError(f"servers cannot be searched on the local network ({error})") from error


async def _browse(interfaces: Sequence[str] | None) -> dict[str, str]:
    try:
        from zeroconf import Error, InterfaceChoice, ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf
    except ModuleNotFoundError:
        raise RemoteError(NO_PACKAGE) from None
    looks: dict[str, asyncio.Task[str | None]] = {}

    async def look(zeroconf: Any, name: str) -> str | None:
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            is_complete = await info.async_request(zeroconf, 1000 * LISTEN_S)
        except Error:  # another program published something that is not a name of a server
            return None
        return await _reachable(addresses_of(info)) if is_complete else None

    def on_change(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if name in looks:
            looks.pop(name).cancel()
        if state_change is not ServiceStateChange.Removed:
            looks[name] = asyncio.create_task(look(zeroconf, name))

    async with AsyncZeroconf(InterfaceChoice.All if interfaces is None else list(interfaces)) as network:
        browser = AsyncServiceBrowser(network.zeroconf, SERVICE_TYPE, handlers=[on_change])
        await asyncio.sleep(LISTEN_S)
        await browser.async_cancel()
        found = {
            name.removesuffix(f".{SERVICE_TYPE}"): looks[name].result() for name in sorted(looks) if looks[name].done()
        }
    return {name: address for name, address in found.items() if address}


class Neighbors:
    """The servers of the local network for ComfyUI's menu.

    ComfyUI asks for them while it starts and whenever a page is loaded. To listen takes seconds, so it is done in a
    thread, and what is found is used from the next time on.
    """

    FRESH_S = 10.0
    LONGEST_S = 10.0  # of a wait for a server of this name

    def __init__(self, search: Callable[[], dict[str, str]] = browse) -> None:
        """Make the menu. search: as `browse`."""
        self._search = search
        self._known: dict[str, str] = {}
        self._error: RemoteError | None = None
        self._searched = float("-inf")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def names(self) -> list[str]:
        """Return the names of the servers that were found, or a sentence that says why there are none."""
        self._begin()
        return list(self._known) or [str(self._error or "no server found yet: reload this page")]

    def address(self, name: str, look: Callable[[], None] = lambda: None) -> str:
        """Return the address of a server. Raises RemoteError if none of this name is found in time.

        look: called about ten times a second. It may raise, which ends the wait.
        """
        deadline = time.monotonic() + self.LONGEST_S
        for _ in range(2):
            self._begin(is_urgent=name not in self._known)
            thread = self._thread
            while name not in self._known and thread and thread.is_alive() and time.monotonic() < deadline:
                thread.join(LOOK_S)
                look()
            if name in self._known:
                return self._known[name]
        raise self._error or RemoteError(
            f"no server {name!r} was found on the local network; found: {', '.join(self._known) or 'none'}. "
            "Choose another one, or start it with --advertise"
        )

    def _begin(self, is_urgent: bool = False) -> None:
        """Search in a thread, unless that is being done, or was done a short time ago and is not urgent."""
        with self._lock:
            is_busy = self._thread is not None and self._thread.is_alive()
            if not is_busy and (is_urgent or time.monotonic() - self._searched > self.FRESH_S):
                self._searched = time.monotonic()
                self._thread = threading.Thread(target=self._find, daemon=True)
                self._thread.start()

    def _find(self) -> None:
        try:
            self._known, self._error = self._search(), None
        except RemoteError as error:
            self._known, self._error = {}, error
