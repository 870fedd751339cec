"""Servers that advertise themselves on the local network (`serve --advertise`), which the package zeroconf finds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .remote import RemoteError, read_address

SERVICE_TYPE = "_vae-server._tcp.local."
LISTEN_S = 2.0
NO_PACKAGE = "to find servers, install zeroconf in ComfyUI's Python: python -m pip install zeroconf"


def address_of(info: Any) -> str | None:
    """Return the address in a zeroconf.ServiceInfo; None if it has none."""
    told = {
        (key or b"").decode(errors="replace"): (value or b"").decode(errors="replace")
        for key, value in info.properties.items()
    }
    host = told.get("host") or next(iter(info.parsed_addresses()), "")
    host = f"[{host}]" if ":" in host else host
    address = f"http{'s' * (told.get('tls') == '1')}://{host}:{info.port}"
    try:
        is_plain = read_address(address).base == address.lower()
    except RemoteError:
        is_plain = False
    return address if is_plain else None


def browse(interfaces: Sequence[str] | None = None) -> dict[str, str]:
    """Return the addresses of the servers by their names, after it has listened for them.

    interfaces: IP addresses of this machine, on whose networks to listen; None for all. It may not run in the thread of
    an event loop, which zeroconf would use. Raises RemoteError without zeroconf, or if the network cannot be used.
    """
    try:
        from zeroconf import InterfaceChoice, ServiceBrowser, ServiceStateChange, Zeroconf
    except ModuleNotFoundError:
        raise RemoteError(NO_PACKAGE) from None
    names: set[str] = set()

    def on_change(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        (names.discard if state_change is ServiceStateChange.Removed else names.add)(name)

    try:
        with Zeroconf(InterfaceChoice.All if interfaces is None else list(interfaces)) as network:
            ServiceBrowser(network, SERVICE_TYPE, handlers=[on_change])
            time.sleep(LISTEN_S)
            infos = [network.get_service_info(SERVICE_TYPE, name) for name in sorted(names)]
    except OSError as error:
        raise RemoteError(f"servers cannot be searched on the local network ({error})") from error
    found = {info.name.removesuffix(f".{SERVICE_TYPE}"): address_of(info) for info in infos if info is not None}
    return {name: address for name, address in found.items() if address}


class Neighbors:
    """The servers of the local network for ComfyUI's menu.

    ComfyUI asks for them while it starts and whenever a page is loaded. To listen takes seconds, so it is done in a
    thread, and what is found is used from the next time on.
    """

    FRESH_S = 10.0

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

    def address(self, name: str) -> str:
        """Return the address of a server. Raises RemoteError if none of this name is found."""
        for _ in range(2):
            self._begin(is_urgent=name not in self._known)
            if name not in self._known and self._thread is not None:
                self._thread.join()
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
