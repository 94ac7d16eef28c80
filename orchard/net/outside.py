"""Connections to hosts whose names users choose: the address is checked after the name was resolved.

A user could otherwise have the controller send requests to services that listen on the loopback addresses of its host,
or to the metadata service of a cloud. The connection goes to the address that was checked, so a name that resolves to
another address a moment later gains nothing. Other addresses of the host, and of its network, are not refused.
"""

from __future__ import annotations

import ipaddress
import socket

import trio

from orchard.net import tcp

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# An IPv4 address in the last 32 bits: NAT64 (RFC 6052), and the deprecated "IPv4-compatible" addresses.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
# "This host on this network" (RFC 1122, section 3.2.1.3).
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


def why_refused(text: str) -> str:
    """Return what kind of address may not be connected to, for example "a loopback address"; "" for all others."""
    address = _embedded(ipaddress.ip_address(text.partition("%")[0]))
    if address.is_loopback:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    if address.is_unspecified or address in _THIS_NETWORK:
        return "an unspecified address"
    return "a multicast address" if address.is_multicast else ""


def _embedded(address: _Address) -> _Address:
    """Return the IPv4 address that an IPv6 address stands for, if it does so, else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


async def connect_outside(host: str, port: int) -> trio.abc.Stream:
    """Connect as `tcp.connect` does, but never to a loopback, link-local or multicast address. Raises OSError."""
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host} is not a host name: {error}") from None
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    refused = {address: reason for address in addresses if (reason := why_refused(address))}
    failure: OSError | None = None
    for address in addresses.keys() - refused.keys():
        try:
            return await tcp.connect(address, port)
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure
    address, reason = next(iter(refused.items()))
    raise OSError(f"{host} is {address}, {reason}, expected another unless --allow-local-webhooks is given")
