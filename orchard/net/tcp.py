"""TCP connections: keep-alive, the kernel's view of unacknowledged data, and copying bytes between two streams.

HTTP and WebSockets are in other files.

A connection can be half open: the peer's host or the network path to it is gone, and no packet has told this host. The
peer's kernel acknowledges what it receives as long as its host is reachable, even while the peer's process is stopped.
So a connection is half open if its peer's kernel acknowledges nothing. Linux shows this for each connection (struct
tcp_info of linux/tcp.h, tcp(7)). Elsewhere the kernel's keep-alive finds the idle connections that are half open.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from orchard.base.nursery import first_exception
from orchard.net import tls
from orchard.net.streams import TLSStream

# Consecutive retransmissions and probes without an answer that mark the peer's kernel as silent. One of them may be
# unanswered at any time: a peer with a window of zero is probed again and again, in the end every 120 seconds.
_UNANSWERED = 2
# struct tcp_info: tcpi_retransmits, tcpi_probes, tcpi_unacked, tcpi_last_ack_recv, tcpi_notsent_bytes.
_TCP_INFO = struct.Struct("=xxBB 20x I 28x I 84x I")
# The first probe after 20 idle seconds, three probes, 10 seconds apart. Each system has some of these options.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_SPLICE_BYTES = 128 * 1024

# Opens a connection to a host and port, as `connect` does.
Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """The kernel's view of the data that the peer has not acknowledged.

    `pending` says whether there is any. `silent_seconds` is how long the peer's kernel has said nothing, and 0.0 as
    long as it answers to retransmissions and probes.
    """

    pending: bool = False
    silent_seconds: float = 0.0


async def connect(host: str, port: int) -> trio.SocketStream:
    """Open a connection that the kernel ends within 50 seconds after the peer has vanished, whether it is idle or sends.

    A WebSocket that only waits needs that: the controller pings such a client, and a client that receives no pings does
    not miss them. The caller closes the connection. Raises OSError.
    """
    stream = await trio.open_tcp_stream(host, port)
    _set_keep_alive(stream.setsockopt)
    _set_user_timeout(stream.setsockopt, 50_000)
    return stream


async def open_listeners(host: str | None, port: int) -> list[trio.SocketListener]:
    """Open listening sockets with keep-alive; `host` None means all addresses. Raises OSError.

    With port 0 each address would get another port, so there is only one socket then.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    for listener in listeners:
        keep_accepted_alive(listener)
    if port == 0:
        for listener in listeners[1:]:
            await listener.aclose()
        del listeners[1:]
    return listeners


def keep_accepted_alive(listener: trio.SocketListener) -> None:
    """Have the kernel end idle connections of this listener whose client has vanished. They inherit the options.

    Connections with unacknowledged data last until the kernel gives up retransmitting, which takes about a quarter of
    an hour.
    """
    _set_keep_alive(listener.socket.setsockopt)


def disable_user_timeout(stream: trio.abc.Stream) -> None:
    """Keep the connection while the peer reads nothing, however long. The caller has to check `unacknowledged` instead.

    TCP_USER_TIMEOUT, which `connect` sets, would end a connection whose reader is paused, though its kernel answers.
    Does nothing to a stream that is neither a TCP socket nor TLS over one.
    """
    connection = socket_of(stream)
    if connection is not None:
        _set_user_timeout(connection.setsockopt, 0)


def unacknowledged(stream: trio.abc.Stream) -> Unacknowledged:
    """Return the kernel's view of unacknowledged data. Empty for streams other than TCP, and on all systems but Linux."""
    connection = socket_of(stream)
    if connection is None or sys.platform != "linux":
        return Unacknowledged()
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        # A socket of another kind, or a closed one.
        return Unacknowledged()
    # An older kernel returns a shorter struct.
    retransmits, probes, unacked, last_ack_ms, unsent = _TCP_INFO.unpack(info.ljust(_TCP_INFO.size, b"\0"))
    silent = retransmits + probes >= _UNANSWERED
    return Unacknowledged(bool(unacked or unsent), last_ack_ms / 1000 if silent else 0.0)


async def splice(one: trio.abc.Stream, other: trio.abc.Stream) -> str:
    """Copy bytes in both directions until one stream ends. Return why it broke, or "" if it ended regularly.

    Everything that was received before the end is sent on first. The caller closes both streams.
    """
    why = ""

    async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        nonlocal why
        try:
            while data := await source.receive_some(_SPLICE_BYTES):
                # The other direction reads from the sink, and so notices that the sink is broken.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            why = f"the connection broke: {first_exception(error.__cause__ or error)}"
        nursery.cancel_scope.cancel()

    # Both directions end with the first of them.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy, one, other)
        nursery.start_soon(copy, other, one)
    return why


def _set_keep_alive(setsockopt: Callable[[int, int, int], None]) -> None:
    setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            setsockopt(socket.IPPROTO_TCP, option, value)


def _set_user_timeout(setsockopt: Callable[[int, int, int], None], milliseconds: int) -> None:
    """Set how long sent data may stay unacknowledged; 0 is the kernel's own limit. Only Linux has this option."""
    if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        setsockopt(socket.IPPROTO_TCP, option, milliseconds)


def socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """Return the socket of a TCP stream, or of TLS over one; None for other streams."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream | TLSStream) else stream
    return transport.socket if isinstance(transport, trio.SocketStream) else None


def describe_network_error(error: BaseException) -> str:
    """Return a short phrase for why there is no connection. trio's own text lists every attempt."""
    cause = first_exception(error.__cause__) if error.__cause__ is not None else error
    if isinstance(cause, ssl.SSLError):
        return tls.reason_of(cause)
    if isinstance(cause, socket.gaierror):
        return str(cause.strerror).lower()
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno).lower()
    return str(cause) or "the peer closed it"
