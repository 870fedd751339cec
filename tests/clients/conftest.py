"""A proxy before a server, whose answers a test chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.scripted import Proxy, scripted


@pytest.fixture
def proxy(url: str) -> Iterator[tuple[Proxy, str]]:
    with scripted(url) as found:
        yield found
