"""One connection of the HTTP server, and what all connections of a server share: limits, waiting lists, deadlines.

A connection reads ahead into one bounded buffer and sends with a deadline, whether it is in the clear or over TLS
(streams.py). What a request is, and how it is answered, is in exchange.py.
"""

from __future__ import annotations

import string
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic

import trio

from orchard.net.request import AdmittedT, AnyResponse, HTTPError, Request, SlowAdmission
from orchard.net.streams import PlainStream, TLSStream
from orchard.net.unauthenticated import Unauthenticated

# Bytes of one write. Each write has its own deadline, so that a slow reader of a large answer is not closed.
SEND_BYTES = 256 * 1024
# A larger write waits for one of the places that `held_bytes` allows. Most answers are smaller.
SMALL_BYTES = 16 * 1024
# Interval of the search for clients that read nothing.
_LOOK_SECONDS = 1.0
_EMPTY_LINE = b"\r\n"
# A request in plain HTTP begins with one of these bytes, and TLS never does.
_LETTERS = frozenset(string.ascii_uppercase.encode())


class Disconnected(Exception):  # noqa: N818 -- a state of the connection, not an error of the program
    """The client is gone, or took or sent nothing for too long, so that no answer can reach it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Beyond a limit it is answered with the status named here, and the connection closes."""

    # 431: bytes of the request line and the headers together; 414 if the request line alone is longer.
    header_bytes: int = 16 * 1024
    # 431.
    header_count: int = 100
    # Between requests. The connection is closed without an answer, as clients expect. A client or proxy that closes its
    # idle connections earlier never sends a request that crosses the close: 60, 75 and 90 seconds are common among them.
    first_byte_seconds: float = 100.0
    # 408: from the first byte of a request to its last header. A TLS handshake may take as long, from the accept.
    head_seconds: float = 10.0
    # 408: for the body, and one second more for each 4 KiB of it. How large it may be depends on the operation.
    body_seconds: float = 30.0
    # A client that takes none of 256 KiB in this time is closed.
    send_seconds: float = 30.0
    # After a refusal the connection stays open for a while, and unread bytes are discarded: closing it with unread
    # bytes would send a reset, which can overtake the answer. So a client that sends twice the largest body of the API
    # before it reads gets its answer, too.
    linger_seconds: float = 1.0
    linger_bytes: int = 8 * 1024 * 1024
    # Beyond it a connection that has not authenticated is closed, or else the one that has been idle for longest.
    connections: int = 16_384
    # Connections that have not authenticated, in all and of one source. Beyond it the oldest of them is closed. A host
    # with hundreds of workers, or a proxy, opens as many within the time of a few handshakes. One that has sent nothing
    # takes 8 KiB, one after its TLS handshake 24 KiB.
    unauthenticated: int = 2_048
    unauthenticated_of_source: int = 1_024
    # Bytes of all unfinished bodies, and 16 times those of all unfinished heads; beyond it the connection of the
    # oldest one is closed. As many may be held by all large answers that are being sent; beyond it answers wait for
    # each other, and clients that take nothing are closed.
    held_bytes: int = 64 * 1024 * 1024


class Unfinished:
    """What was read of unfinished heads or bodies: at most `limit` bytes together. The oldest one gives way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sizes: dict[Connection, int] = {}
        self._total = 0

    def grow(self, connection: Connection, size: int) -> None:
        """Count the bytes that a connection has read, and close others if all together have read too many."""
        self._total += size - self._sizes.get(connection, 0)
        self._sizes[connection] = size
        while self._total > self._limit:
            oldest = next(iter(self._sizes))
            self.end(oldest)
            oldest.abort()

    def end(self, connection: Connection) -> None:
        self._total -= self._sizes.pop(connection, 0)


class Sends:
    """The writes under way over sockets, each with its deadline, and a bound on the large ones among them.

    A cancel scope with a deadline for each small write would cost more than the write's other work.
    """

    def __init__(self, seconds: float, held_bytes: int) -> None:
        self.seconds = seconds
        # The deadline of each small write, by trio's clock. The connection that has waited longest is first.
        self.small: dict[Connection, float] = {}
        self.large: dict[Connection, float] = {}
        # One place for each large write, which holds a block of the answer, and its ciphertext of the same size.
        self._places = trio.Semaphore(max(1, held_bytes // (2 * SEND_BYTES)))

    async def wait_place(self) -> dict[Connection, float]:
        """Wait until another large write may begin. Return the table in which to note its deadline."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            await self._places.acquire()
        return self.large

    def end(self, connection: Connection, writes: dict[Connection, float]) -> None:
        del writes[connection]
        if writes is self.large:
            self._places.release()

    async def close_slow_readers(self) -> None:
        """Close the sockets of clients that take nothing for too long, until cancelled.

        For each large answer that waits for a place, the oldest large write that has lasted for `_LOOK_SECONDS` is
        closed, too.
        """
        while True:
            await trio.sleep(_LOOK_SECONDS)
            now = trio.current_time()
            slow = [one for writes in (self.small, self.large) for one, until in writes.items() if until <= now]
            stuck = [one for one, until in self.large.items() if until <= now + self.seconds - _LOOK_SECONDS]
            for connection in {*slow, *stuck[: self._places.statistics().tasks_waiting]}:
                connection.abort()


@dataclass(frozen=True, slots=True)
class Service(Generic[AdmittedT]):
    """The functions that admit and answer requests."""

    # Answers a request, or raises HTTPError. The second argument is what `admit` has returned.
    handler: Callable[[Request, AdmittedT], Awaitable[AnyResponse]]
    # Sees each request before its body is read or asked for, or refuses it by raising HTTPError: it authenticates the
    # client, so that a stranger cannot make the server keep megabytes.
    admit: Callable[[Request], AdmittedT | SlowAdmission[AdmittedT]]
    # Asked right before an answer leaves, and before each piece of a `Stream`: its error is sent in place of any
    # answer, and the connection ends.
    refuse_all: Callable[[], HTTPError | None] = lambda: None
    # Called with each request and its status when it has been answered; None is a request whose head could not be read.
    count: Callable[[Request | None, int], None] = lambda request, status: None


class ServerState:
    """What all connections of a server share."""

    def __init__(self, service: Service[Any], limits: Limits, stop: trio.Event) -> None:
        self.service = service
        self.limits = limits
        self.stop = stop
        # Connections that wait for a handshake or a request, the one that has waited for longest first. Their cancel
        # scopes can be cancelled to make room.
        self.waiting: dict[trio.CancelScope, None] = {}
        self.unauthenticated = Unauthenticated(
            Connection.abort, limits.unauthenticated_of_source, limits.unauthenticated
        )  # fmt: skip
        self.heads, self.bodies = Unfinished(limits.held_bytes // 16), Unfinished(limits.held_bytes)
        self.sends = Sends(limits.send_seconds, limits.held_bytes)
        self.open = 0  # connections

    def make_room(self) -> bool:
        """Close a connection if there are too many. Return whether there is room for another one."""
        if self.open < self.limits.connections or self.unauthenticated.make_room():
            return True
        idle = next(iter(self.waiting), None)
        if idle is None:
            return False
        del self.waiting[idle]
        idle.cancel()
        return True


class Connection:
    """A client's connection and what was read from it ahead of use. The task that makes one calls `end`."""

    # Thousands of connections wait for a request and have nothing but this and a task.
    __slots__ = ("buffer", "peer", "server", "stream")

    def __init__(self, server: ServerState, stream: trio.abc.Stream) -> None:
        self.server = server
        self.stream: PlainStream | TLSStream = stream if isinstance(stream, TLSStream) else PlainStream(stream)
        self.peer = _peer_address(self.stream.transport_stream)
        self.buffer = bytearray()
        server.open += 1
        server.unauthenticated.add(self, self.peer)

    # ---- waiting

    async def shake_hands(self) -> bool:
        """Complete the TLS handshake, if the connection is over TLS. Return False if that took too long.

        Raises Disconnected; HTTPError 400 if the client sends HTTP in the clear, in which it can be answered then.
        """
        stream = self.stream
        if not isinstance(stream, TLSStream):
            return True
        try:
            with self._waiting(self.server.limits.head_seconds) as scope:
                if not await stream.wait_hello():
                    raise Disconnected("the client closed the connection before the TLS handshake")
                if stream.early[0] in _LETTERS:
                    self.stream = PlainStream(stream.transport_stream)
                    raise HTTPError(
                        400, "this port expects HTTPS, and the request is plain HTTP; use a URL with https://"
                    )
                await stream.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected(str(error)) from error
        return not scope.cancelled_caught

    async def wait_request(self) -> bool:
        """Wait for the first bytes of a request. Return False at the end of the connection. Raises Disconnected."""
        buffer = self.buffer
        if not buffer:
            # A busy client's next request has often arrived by now, and waiting for it would cost more than this look.
            # Other connections get their turn whenever an answer is sent.
            try:
                buffer += self.stream.receive_now() or b""
            except trio.BrokenResourceError as error:
                raise Disconnected("the connection broke") from error
        # A single empty line between requests is ignored (RFC 9112, section 2.2), and does not begin one.
        if buffer and buffer != _EMPTY_LINE:
            return True
        with self._waiting(self.server.limits.first_byte_seconds):
            while await self.fill():
                if buffer != _EMPTY_LINE:
                    return True
        return False

    @contextmanager
    def _waiting(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Cancel the block after that time, when the connection is closed to make room, and when the server stops."""
        waiting = self.server.waiting
        scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        if self.server.stop.is_set():
            scope.cancel()
        waiting[scope] = None
        try:
            with scope:
                yield scope
        finally:
            waiting.pop(scope, None)

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
        with memoryview(self.buffer) as view:
            taken = bytes(view[:size])
        del self.buffer[:size]
        return taken

    def send_now(self, data: bytes) -> bool:
        """Send what can be sent without waiting; False if the next `send` has to send the rest. Raises Disconnected."""
        try:
            return self.stream.send_now(data)
        except trio.BrokenResourceError as error:
            raise Disconnected("the connection broke") from error

    async def send(self, data: bytes) -> None:
        """Send. Raises Disconnected, also if the client takes nothing for too long."""
        if len(data) <= SEND_BYTES:
            await self.send_joined((data,), len(data))
            return
        view = memoryview(data)
        for start in range(0, len(data), SEND_BYTES):
            await self.send_joined((view[start : start + SEND_BYTES],), SEND_BYTES)

    async def send_joined(self, parts: Sequence[bytes | memoryview], size: int, separator: bytes = b"") -> None:
        """Send parts of about `size` bytes, which are joined when it is their turn. Raises Disconnected."""
        sends, stream = self.server.sends, self.stream
        if not stream.is_socket:
            await _send_to_memory(self, separator.join(parts))
            return
        writes = sends.small if size <= SMALL_BYTES else await sends.wait_place()
        writes[self] = trio.current_time() + sends.seconds
        try:
            await stream.send_all(parts[0] if len(parts) == 1 else separator.join(parts))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the connection broke, or the client took nothing for too long") from error
        finally:
            sends.end(self, writes)

    async def linger(self, limit: int | None = None) -> None:
        """End the sending half, then discard what the client still sends, so that it reads the answer.

        Discards at most `limit` bytes, by default `linger_bytes`.
        """
        self.buffer.clear()
        left = self.server.limits.linger_bytes if limit is None else limit
        with (
            trio.move_on_after(self.server.limits.linger_seconds),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self.stream.send_eof()
            while left > 0 and (size := await self.stream.discard_some()):
                left -= size

    # ---- ending

    def abort(self) -> None:
        """Close the connection at once. The task that serves it ends with Disconnected."""
        self.stream.abort()

    async def aclose(self) -> None:
        """Close the connection within `linger_seconds`."""
        with trio.move_on_after(self.server.limits.linger_seconds):
            await self.stream.aclose()

    def end(self) -> None:
        """Count the connection no longer."""
        self.server.open -= 1
        self.server.unauthenticated.remove(self)


async def _send_to_memory(connection: Connection, data: bytes) -> None:
    """Send over a stream that cannot be closed by another task, which only tests and the simulation have."""
    seconds = connection.server.limits.send_seconds
    try:
        with trio.move_on_after(seconds):
            await connection.stream.send_all(data)
            return
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Disconnected("the connection broke") from error
    raise Disconnected(f"the client took nothing for {seconds:g} seconds")


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
