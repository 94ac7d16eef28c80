"""What the system does for a TCP connection, and knows of it. Law: asks and tells the system; reads and writes nothing.

A connection can be half open: the other end's host is gone, or the way to it, and nobody has said so. Its system answers
to everything that is sent, as long as it is there, and though its process may stand still; so a system that answers to
nothing is the sign of it. Linux tells that of each connection (struct tcp_info of linux/tcp.h, tcp(7)); where a system
does not, its own keep-alive finds the connections that rest.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

import trio

# Consecutive ones without an answer. A system that answers leaves one at most: with a window of zero it is asked for
# more room again and again, at last every 120 seconds.
UNANSWERED = 2
_TCP_INFO = struct.Struct("=xxBB 20x I 28x I 84x I")  # retransmits, probes, unacked, last_ack_recv, notsent_bytes


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What of that which was sent has not arrived: whether there is any, and since when nothing was heard (seconds).

    `unanswered` is 0.0 as long as the other end's system answers to what is sent again.
    """

    pending: bool = False
    unanswered: float = 0.0


async def connect(host: str, port: int) -> trio.SocketStream:
    """Open a connection that does not wait for ever for somebody who is gone. Raises OSError."""
    return keep_alive(await trio.open_tcp_stream(host, port))


def keep_alive(stream: trio.SocketStream) -> trio.SocketStream:
    """Have the system find out when the other end is gone without a word: within 50 seconds, whether or not it sends.

    A WebSocket that only waits would never know: the controller pings it, but nothing is missed when pings stay away.
    """
    _ask_again(stream.setsockopt)
    if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        stream.setsockopt(socket.IPPROTO_TCP, option, 50_000)  # milliseconds, for data under way
    return stream


def keep_accepted_alive(listener: trio.SocketListener) -> None:
    """Have the system find out when a client that only waits is gone without a word: accepted connections inherit it.

    Data under way may wait longer: until the system gives up sending it, after a quarter of an hour or so.
    """
    _ask_again(listener.socket.setsockopt)


def _ask_again(setsockopt: Callable[[int, int, int], None]) -> None:
    """Idle for 20 seconds, then three probes 10 seconds apart."""
    setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {"TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    for name, value in wanted.items():
        if (option := getattr(socket, name, None)) is not None:  # each system has some of them
            setsockopt(socket.IPPROTO_TCP, option, value)


def be_patient(stream: trio.abc.Stream) -> None:
    """Let data under way wait as long as the other end takes none. Who does this looks after `outgoing` himself.

    TCP_USER_TIMEOUT would end a connection whose reader stands still, though his system answers.
    """
    connection = _socket(stream)
    if connection is not None and (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        connection.setsockopt(socket.IPPROTO_TCP, option, 0)


def outgoing(stream: trio.abc.Stream) -> Outgoing:
    """Give what the system knows of that which was sent; of what is no TCP connection, and elsewhere than on Linux, nothing."""
    connection = _socket(stream)
    if connection is None or sys.platform != "linux":
        return Outgoing()
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:  # it is no TCP connection, or closed
        return Outgoing()
    again, probes, unacknowledged, milliseconds, unsent = _TCP_INFO.unpack(told.ljust(_TCP_INFO.size, b"\0"))
    return Outgoing(bool(unacknowledged or unsent), milliseconds / 1000 if again + probes >= UNANSWERED else 0.0)


def _socket(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    return transport.socket if isinstance(transport, trio.SocketStream) else None
