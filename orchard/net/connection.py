"""One connection of the HTTP server, and what all connections of a server share: limits, waiting lists, deadlines.

A connection reads ahead into one bounded buffer and sends with a deadline, whether it is in the clear or over TLS
(streams.py). What a request is, and how it is answered, is in exchange.py.
"""

from __future__ import annotations

import email.utils
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from orchard.net.request import Admission, AnyResponse, Request
from orchard.net.streams import PlainStream, TLSStream

# Bytes of one write. Each write has its own deadline, so that a slow reader of a large answer is not closed.
SEND_BYTES = 256 * 1024
# Between two searches for clients that read nothing.
_LOOK_SECONDS = 1.0
_EMPTY_LINE = b"\r\n"


class Disconnected(Exception):  # noqa: N818 -- a state of the connection, not an error of the program
    """The client is gone, or took or sent nothing for too long, so that no answer can reach it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Beyond a limit it is answered with the status named here, and the connection closes."""

    # 431: bytes of the request line and the headers together; 414 if the request line alone is longer.
    header_bytes: int = 16 * 1024
    # 431.
    header_count: int = 100
    # 413.
    body_bytes: int = 4 * 1024 * 1024
    # Between requests. The connection is closed without an answer, as clients expect.
    first_byte_seconds: float = 75.0
    # 408: from the first byte of a request to its last header. A TLS handshake may take as long, from the accept.
    head_seconds: float = 10.0
    # 408: for the body, and one second more for each 4 KiB of it.
    body_seconds: float = 30.0
    # A client that takes none of 256 KiB in this time is closed.
    send_seconds: float = 30.0
    # After a refusal the connection stays open for a while, and unread bytes are discarded: closing it with unread
    # bytes would send a reset, which can overtake the answer.
    linger_seconds: float = 1.0
    linger_bytes: int = 256 * 1024
    # Beyond it the connection that has been idle for longest is closed.
    connections: int = 16_384
    # TLS connections whose handshake is not complete. Beyond it the oldest of those is closed. So many that have sent
    # nothing take 16 MiB (`./run bench idle`).
    handshakes: int = 2_048


class ServerState:
    """What all connections of a server share."""

    def __init__(
        self,
        handler: Callable[[Request, Any], Awaitable[AnyResponse]],
        admit: Callable[[Request], Admission],
        limits: Limits,
        log: logging.Logger,
        clock: Callable[[], float],
        stop: trio.Event,
    ) -> None:
        self.handler = handler
        self.admit = admit
        self.limits = limits
        self.log = log
        self.stop = stop
        # Connections that wait for a request, and those whose TLS handshake is not complete.
        # Their cancel scopes can be cancelled to make room, the oldest first.
        self.idle: dict[trio.CancelScope, None] = {}
        self.handshaking: dict[trio.CancelScope, None] = {}
        # Connections over sockets that are sending, and until when they may (trio's clock).
        self.sending: dict[Connection, float] = {}
        self.open = 0  # connections
        self._clock = clock
        self._date = (-1, "")

    def make_room(self) -> bool:
        """Close a waiting connection if there are too many. Return whether there is room for another one."""
        if len(self.handshaking) >= self.limits.handshakes:
            _cancel_oldest(self.handshaking)
        if self.open < self.limits.connections:
            return True
        return _cancel_oldest(self.handshaking) or _cancel_oldest(self.idle)

    async def close_slow_readers(self) -> None:
        """Close the sockets of clients that take nothing for too long, until cancelled.

        A cancel scope with a deadline for each small write would take a fifth of its time (`./run bench watch`).
        """
        while True:
            await trio.sleep(_LOOK_SECONDS)
            now = trio.current_time()
            for connection in [one for one, until in self.sending.items() if until <= now]:
                connection.stream.abort()

    def date(self) -> str:
        """Return the value of the header Date for now."""
        now = int(self._clock())
        if now != self._date[0]:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]


class Connection:
    """A client's connection and what was read from it ahead of use."""

    # Thousands of connections wait for a request and have nothing but this and a task.
    __slots__ = ("buffer", "peer", "server", "stream")

    def __init__(self, server: ServerState, stream: trio.abc.Stream) -> None:
        self.server = server
        self.stream: PlainStream | TLSStream = stream if isinstance(stream, TLSStream) else PlainStream(stream)
        self.peer = _peer_address(self.stream.transport_stream)
        self.buffer = bytearray()

    # ---- waiting

    async def shake_hands(self) -> bool:
        """Complete the TLS handshake, if the connection is over TLS. Return False if that took too long.

        Raises Disconnected.
        """
        stream = self.stream
        if not isinstance(stream, TLSStream):
            return True

        async def handshake() -> None:
            if not await stream.wait_hello():
                raise Disconnected("the client closed the connection before the TLS handshake")
            await stream.do_handshake()

        try:
            return await self._wait(self.server.handshaking, self.server.limits.head_seconds, handshake)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected(str(error)) from error

    async def wait_request(self) -> bool:
        """Wait for the first bytes of a request. Return False at the end of the connection. Raises Disconnected."""
        if self._has_request():
            return True
        waited = await self._wait(self.server.idle, self.server.limits.first_byte_seconds, self._fill_with_request)
        return waited and bool(self.buffer)

    def _has_request(self) -> bool:
        """Whether something of a request was read or can be read now. Raises Disconnected.

        Busy clients have sent their next request while others had their turn, and to wait for it would take a fifth of a
        small request's time (`./run bench api`). Other connections get their turn with each answer that is sent.
        """
        if not self.buffer:
            try:
                data = self.stream.receive_now()
            except trio.BrokenResourceError as error:
                raise Disconnected("the connection broke") from error
            if data:
                self.buffer += data
        # A single empty line between requests is ignored (RFC 9112, section 2.2), and does not begin one.
        return bool(self.buffer) and self.buffer != _EMPTY_LINE

    async def _fill_with_request(self) -> None:
        while await self.fill():
            if self.buffer != _EMPTY_LINE:
                return
        self.buffer.clear()

    async def _wait(
        self, waiting: dict[trio.CancelScope, None], seconds: float, wait: Callable[[], Awaitable[object]]
    ) -> bool:
        """Wait with the connection in a list, from which it can be closed to make room, or when the server stops.

        Return whether the wait ended by itself and in time.
        """
        scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        if self.server.stop.is_set():
            scope.cancel()
        waiting[scope] = None
        try:
            with scope:
                await wait()
        finally:
            waiting.pop(scope, None)
        return not scope.cancelled_caught

    async def until_gone(self) -> None:
        """Return when the client has gone. What it sends meanwhile is kept."""
        with suppress(Disconnected):
            # Cancelling a read loses nothing, so this may be cancelled at any time.
            while await self.fill():
                if len(self.buffer) > self.server.limits.header_bytes:
                    # The buffer is bounded, so a client that sends so much ahead is not watched any longer.
                    await trio.sleep_forever()

    # ---- reading and sending

    async def fill(self) -> bool:
        """Read into the buffer; False at the end of what the client sends. Raises Disconnected."""
        try:
            data = await self.stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the connection broke") from error
        self.buffer += data
        return bool(data)

    def take(self, size: int | None = None) -> bytes:
        """Take bytes from the front of the buffer, all without a size."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def send(self, data: bytes) -> None:
        """Send. Raises Disconnected, also if the client takes nothing for too long."""
        server, stream = self.server, self.stream
        if not stream.is_socket:
            await self._send_to_memory(data)
            return
        seconds = server.limits.send_seconds
        try:
            server.sending[self] = trio.current_time() + seconds
            if len(data) <= SEND_BYTES:
                await stream.send_all(data)
                return
            view = memoryview(data)
            for start in range(0, len(data), SEND_BYTES):
                server.sending[self] = trio.current_time() + seconds
                await stream.send_all(view[start : start + SEND_BYTES])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the connection broke, or the client took nothing for too long") from error
        finally:
            server.sending.pop(self, None)

    async def _send_to_memory(self, data: bytes) -> None:
        """Send over a stream that cannot be closed by another task, which only tests and the simulation have."""
        seconds = self.server.limits.send_seconds
        try:
            with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
                view = memoryview(data)
                for start in range(0, len(data), SEND_BYTES):
                    scope.deadline = trio.current_time() + seconds
                    await self.stream.send_all(view[start : start + SEND_BYTES])
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the connection broke") from error
        raise Disconnected(f"the client took nothing for {seconds:g} seconds")

    async def linger(self) -> None:
        """End the sending half, then discard what the client still sends, within bounds, so that it reads the answer."""
        self.buffer.clear()
        left = self.server.limits.linger_bytes
        with (
            trio.move_on_after(self.server.limits.linger_seconds),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self.stream.send_eof()
            while left > 0 and (size := await self.stream.discard_some()):
                left -= size

    async def aclose(self) -> None:
        """Close the connection within `linger_seconds`."""
        with trio.move_on_after(self.server.limits.linger_seconds):
            await self.stream.aclose()


def _cancel_oldest(waiting: dict[trio.CancelScope, None]) -> bool:
    """Cancel and remove the scope that was added first. Return whether there was one."""
    oldest = next(iter(waiting), None)
    if oldest is None:
        return False
    del waiting[oldest]
    oldest.cancel()
    return True


def _peer_address(stream: trio.abc.Stream) -> str:
    """Return the client's IP address, "-" if it has none."""
    if isinstance(stream, trio.SocketStream):
        try:
            name = stream.socket.getpeername()
        except OSError:
            return "-"
        if isinstance(name, tuple):
            return str(name[0])
    return "-"
