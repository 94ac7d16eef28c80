"""A bound on the connections that have not authenticated, for the HTTP server and the SSH jump host alike.

Anyone can open connections and stay silent. So those that have not authenticated are bounded for each source and in
all, and the oldest one is closed for a new one. Connections that have authenticated are not counted: hundreds of
workers may share one address. What a single connection may hold before it has authenticated is bounded by its server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

ConnectionT = TypeVar("ConnectionT", bound=Hashable)


class Unauthenticated(Generic[ConnectionT]):
    """The connections that have not authenticated: at most `per_source` of one source (`source_of`), `total` in all.

    `close` ends a connection at once. It is called for the oldest connection of a source that has too many, or else of
    the source that has the most.
    """

    def __init__(self, close: Callable[[ConnectionT], object], per_source: int, total: int) -> None:
        self._close = close
        self._per_source = per_source
        self._total = total
        self._sources: dict[ConnectionT, str] = {}
        # Each source's connections, the oldest first.
        self._of_source: dict[str, dict[ConnectionT, None]] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, connection: ConnectionT, address: str) -> None:
        """Count a new connection from a client's address, and close another one if there are too many."""
        source = source_of(address)
        if len(self._of_source.get(source, ())) >= self._per_source:
            self._close_oldest(source)
        elif len(self._sources) >= self._total:
            self.make_room()
        self._sources[connection] = source
        self._of_source.setdefault(source, {})[connection] = None

    def remove(self, connection: ConnectionT) -> None:
        """Count a connection no longer: it has authenticated or ended. Does nothing if it is not counted."""
        source = self._sources.pop(connection, None)
        if source is not None:
            same = self._of_source[source]
            del same[connection]
            if not same:
                del self._of_source[source]

    def make_room(self) -> bool:
        """Close the oldest connection of the source that has the most. Return whether there was one."""
        if self._of_source:
            self._close_oldest(max(self._of_source, key=lambda source: len(self._of_source[source])))
            return True
        return False

    def _close_oldest(self, source: str) -> None:
        oldest = next(iter(self._of_source[source]))
        self.remove(oldest)
        self._close(oldest)


def source_of(address: str) -> str:
    """Return the source of an address: an IPv4 address itself, or an IPv6 host's network of 64 bits."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))
