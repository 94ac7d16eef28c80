"""Connections through the HTTP proxies that the environment names (urls.py).

Every connection goes through CONNECT (RFC 9110, section 9.3.6), in the clear or with TLS inside, because WebSockets
need it. No message contains a proxy's user name or password.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import h11
import trio

from orchard.net import tcp
from orchard.net.urls import Proxy, bracketed, find_proxy

# Limit of the head of a proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024
_RECEIVE_BYTES = 4096


def connector(is_tls: bool, host: str, environ: Mapping[str, str]) -> tcp.Connect:
    """Return a function that connects to a server: `tcp.connect`, or one that goes through the environment's proxy.

    Raises ValueError for a proxy that cannot be used.
    """
    proxy = find_proxy(is_tls, host, environ)
    return tcp.connect if proxy is None else partial(_connect_through, proxy)


async def _connect_through(proxy: Proxy, host: str, port: int) -> trio.abc.Stream:
    """Connect as `tcp.connect` does, through a proxy. Raises OSError, which names the proxy."""
    try:
        stream = await tcp.connect(proxy.host, proxy.port)
    except OSError as error:
        raise OSError(f"no connection to {proxy}: {tcp.describe_network_error(error)}") from None
    is_open = False
    try:
        await _ask_for_tunnel(stream, proxy, f"{bracketed(host)}:{port}")
        is_open = True
    finally:
        if not is_open:
            await trio.aclose_forcefully(stream)
    return stream


async def _ask_for_tunnel(stream: trio.abc.Stream, proxy: Proxy, target: str) -> None:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    headers = [("Host", target)]
    if proxy.authorization:
        headers.append(("Proxy-Authorization", proxy.authorization))
    request = h11.Request(method="CONNECT", target=target, headers=headers)
    try:
        await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        while not isinstance(event := http.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        raise OSError(f"{proxy} gave no valid answer to CONNECT {target}") from None
    if not 200 <= event.status_code < 300:
        reason = bytes(event.reason).decode("latin-1")
        raise OSError(f"{proxy} refused CONNECT {target}: {event.status_code} {reason}".rstrip())
    if http.trailing_data[0]:
        raise OSError(f"{proxy} sent bytes before the server's: is it an HTTP proxy?")
