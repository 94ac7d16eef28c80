"""HTTP/1.1 in: connection loop, limits, streaming, the hand-over to WebSockets. Law: it reads and writes
the streams that its listeners accept, and nothing else; no noun of the product is known here.

Every byte of a connection is read into one bounded buffer, and judged by `http1` before anything is made of it; where that
refuses, the connection is closed, for nobody knows where such a request ends. What follows a request stays in the
buffer: it is the next request, or the first frames of a WebSocket. A body that comes in chunks is put together by h11; with
a head that was judged, a body of known length and the answer there is less to do than h11 would (./run bench api).

A connection is one task, and a plain request is answered in it without another. Only a stream, a WebSocket and
`WhileConnected` have a second one, that notices when the client has gone.

How it ends: an `HTTPError` from anywhere below the handler becomes an answer, and the connection goes on if the request
was read to its end. A client that went away, or takes or sends nothing for too long, ends its connection silently. Any
other exception is logged once and answered with 500. `serve` tells how everything ends together.
"""

from __future__ import annotations

import email.utils
import http
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import h11
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.net import wsframes
from orchard.net.request import (
    Admission,
    AnyResponse,
    Chunked,
    HTTPError,
    Request,
    Response,
    Stream,
    TunnelUpgrade,
    WebSocketUpgrade,
    WhileConnected,
    head_end,
    printable,
    read_head,
    refused,
    too_large,
)
from orchard.net.websocket import CLOSE_SECONDS, TunnelStream, open_messages
from orchard.nursery import sole_exception

RECEIVE_BYTES = 16 * 1024  # of one read: what a TLS record holds
SEND_BYTES = 256 * 1024  # of one write: each has its own deadline, so that a slow reader of much is not cut off
BODY_RATE = 4096  # bytes a second that earn a body more time; a slower one is no client but an attack
LOOK_SECONDS = 1.0  # between two looks for clients that take nothing
LOGGED_PATH = 256  # characters of a path in the log

_ALWAYS = "Server: orchard\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
_SWITCHING = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
_REASONS = {int(status): status.phrase for status in http.HTTPStatus}
# A header that a handler may add: one line (RFC 9110, section 5), and none of those that say where the answer ends.
_HEADER = re.compile(r"(?!content-length:|transfer-encoding:)[A-Za-z0-9-]+: [\t -~\x80-\xff]*\r\n", re.IGNORECASE)

AdmittedT = TypeVar("AdmittedT", bound=Admission)

_logger = logging.getLogger("orchard.net.server")


class Disconnected(Exception):  # noqa: N818 -- it states what is the case; nothing is broken
    """The client is gone, or took or sent nothing for too long: nobody is left to answer to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Beyond a limit it is answered with the status named here, and the connection closes."""

    header_bytes: int = 16 * 1024  # 431; request line and headers together
    header_count: int = 100  # 431
    body_bytes: int = 4 * 1024 * 1024  # 413
    first_byte_seconds: float = 75.0  # between requests; closed without a word, as the client expects
    head_seconds: float = 10.0  # 408; from a request's first byte to its last header; also for the TLS handshake
    body_seconds: float = 30.0  # 408; for a body of no size, and a second more for each 4 KiB of it
    send_seconds: float = 30.0  # a reader that takes none of 256 KiB in this time is closed
    linger_seconds: float = 1.0  # after a refusal, unread bytes are thrown away, else a reset would overtake the answer
    linger_bytes: int = 256 * 1024
    connections: int = 16_384  # beyond it whoever has been idle for longest makes room


# ---- a connection --------------------------------------------------------------------------------------------------


class _Server:
    """What all connections share."""

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
        self.idle: dict[trio.CancelScope, None] = {}  # connections that wait for a request; for longest first
        self.sending: dict[_Connection, float] = {}  # over plain sockets, and until when they may
        self._open = 0
        self._clock = clock
        self._date = (-1, "")

    async def connect(self, stream: trio.abc.Stream) -> None:
        """Serve one connection, for trio.serve_listeners, which closes the stream afterwards in any case."""
        if self._open >= self.limits.connections:
            if not self.idle:
                self.log.warning("a connection was refused: %d are open, and none is idle", self._open)
                return
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.cancel()
        self._open += 1
        try:
            await _Connection(self, stream).run()
        finally:
            self._open -= 1

    async def end_slow_readers(self) -> None:
        """Close the sockets of clients that take nothing for too long, until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            now = trio.current_time()
            for connection in [one for one, until in self.sending.items() if until <= now]:
                if connection.socket is not None:
                    connection.socket.close()

    def date(self) -> str:
        now = int(self._clock())
        if now != self._date[0]:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]


class _Connection:
    """A stream and what was read ahead of it. While it waits for a request it is nothing else: thousands may wait."""

    __slots__ = ("buffer", "peer", "server", "socket", "stream")

    def __init__(self, server: _Server, stream: trio.abc.Stream) -> None:
        self.server = server
        self.stream = stream
        # Of a plain socket the calls are made directly: the stream's take a tenth of a small request's time.
        self.socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self.peer = _peer(stream)
        self.buffer = bytearray()

    async def run(self) -> None:
        limits = self.server.limits
        exchange: _Exchange | None = None
        try:
            if isinstance(self.stream, trio.SSLStream) and not await self._idle(
                limits.head_seconds, self.stream.do_handshake
            ):
                return
            while self._more() or (await self._idle(limits.first_byte_seconds, self.fill) and self.buffer):
                exchange = _Exchange(self)
                if not await exchange.run():
                    break
                exchange = None
            with trio.move_on_after(limits.linger_seconds):
                await self.stream.aclose()
        except (Disconnected, trio.BrokenResourceError, trio.ClosedResourceError) as gone:
            self.server.log.debug("%s: the connection ended: %r", self.peer, gone.__cause__ or gone)
        except Exception:
            self.server.log.exception("the answer to a request failed")
            if exchange is not None:
                with suppress(Disconnected):
                    await exchange.fail()
        finally:
            if exchange is not None:
                exchange.end()

    async def _idle(self, seconds: float, wait: Callable[[], Awaitable[object]]) -> bool:
        """Wait while nobody needs this connection: not beyond the server's stop, and only as long as there is room.

        Give whether what was waited for came.
        """
        scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        if self.server.stop.is_set():
            scope.cancel()
        self.server.idle[scope] = None
        try:
            with scope:
                await wait()
        finally:
            self.server.idle.pop(scope, None)
        return not scope.cancelled_caught

    def _more(self) -> bool:
        """Whether something of a request is there, read ahead or to be read at once. Raises Disconnected.

        Busy clients have sent their next one while others had their turn: to wait for what is there would take a fifth of
        a small request's time (./run bench api). Each answer that is sent leaves the others a turn.
        """
        if not self.buffer and self.socket is not None:
            try:
                self.buffer += os.read(self.socket.fileno(), RECEIVE_BYTES)
            except BlockingIOError:
                pass
            except OSError as error:
                raise Disconnected("the connection broke") from error
        return bool(self.buffer)

    async def fill(self) -> bool:
        """Read into the buffer; False at the end of what the client sends. Raises Disconnected."""
        try:
            receive = self.stream.receive_some if self.socket is None else self.socket.recv
            data: bytes | bytearray = await receive(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise Disconnected("the connection broke") from error
        self.buffer += data
        return bool(data)

    def take(self, size: int) -> bytes:
        """Take bytes from the front of the buffer."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def until_gone(self) -> None:
        """Return when the client has gone. What it sends meanwhile is kept."""
        with suppress(Disconnected):
            # Cancelling a read loses nothing, neither on a socket nor on TLS: it waits first and takes then.
            while await self.fill():
                if len(self.buffer) > self.server.limits.header_bytes:
                    await trio.sleep_forever()  # a client that sends so much ahead is not watched any longer

    async def send(self, data: bytes) -> None:
        """Send. Raises Disconnected."""
        seconds = self.server.limits.send_seconds
        if self.socket is not None and len(data) <= SEND_BYTES:
            await self._send_at_once(self.socket, data)
            return
        try:
            with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
                view = memoryview(data)
                for start in range(0, len(data), SEND_BYTES):
                    scope.deadline = trio.current_time() + seconds
                    await self.stream.send_all(view[start : start + SEND_BYTES])
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise Disconnected("the connection broke") from error
        raise Disconnected(f"the client took nothing for {seconds:g} seconds")

    async def _send_at_once(self, socket: trio.socket.SocketType, data: bytes) -> None:
        """Send what is little: a scope with a deadline for each such would take a fifth of the time (./run bench watch)."""
        sending = self.server.sending
        sending[self] = trio.current_time() + self.server.limits.send_seconds
        try:
            sent = await socket.send(data)
            while sent < len(data):
                sent += await socket.send(data[sent:])
        except (trio.ClosedResourceError, OSError) as error:
            raise Disconnected("the connection broke, or the client took nothing for too long") from error
        finally:
            del sending[self]

    async def linger(self) -> None:
        """Give the client time to read a last answer: throw away what it still sends, within bounds."""
        self.buffer.clear()
        left = self.server.limits.linger_bytes
        with (
            trio.move_on_after(self.server.limits.linger_seconds),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            if isinstance(self.stream, trio.abc.HalfCloseableStream):
                await self.stream.send_eof()
            while left > 0 and (data := await self.stream.receive_some(RECEIVE_BYTES)):
                left -= len(data)


class _Exchange:
    """One request and its answer."""

    __slots__ = ("_account", "_begun", "_connection", "_ended", "_request", "_server", "_since", "_unread")

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._server = connection.server
        self._request: Request | None = None  # until it is in the request log
        self._account = ""
        self._since = 0.0  # when the request's head was there
        self._unread = True  # nobody knows where the request ends
        self._begun = False  # something of the answer may have been sent
        self._ended = False  # all of it was, and the client knows where it ends

    async def run(self) -> bool:
        """Read a request and answer it. Give whether another may follow. Raises Disconnected."""
        answer: AnyResponse | None
        try:
            answer = await self._answer()
        except HTTPError as error:
            answer = self._refused(error)
        except BaseExceptionGroup as group:
            cause = sole_exception(group)
            if not isinstance(cause, HTTPError):
                raise cause from None
            answer = self._refused(cause)
        if isinstance(answer, Response):
            await self._respond(answer)
        elif isinstance(answer, Stream):
            await self._respond_piecewise(answer)
        elif isinstance(answer, WebSocketUpgrade):
            await self._websocket(answer)
        elif isinstance(answer, TunnelUpgrade):
            await self._tunnel(answer)
        return self._ended

    def _refused(self, error: HTTPError) -> Response:
        self._account = error.account or self._account
        return refused(error)

    async def fail(self) -> None:
        """AnyResponse that there is a bug, if nothing was sent yet. Raises Disconnected."""
        if not self._begun:
            await self._respond(refused(HTTPError(500, "internal error")), close=True)
        await self._connection.linger()

    def end(self) -> None:
        if self._request is not None:
            self._record(499)  # no standard has a number for: nobody was left to answer to

    async def _answer(self) -> AnyResponse | None:
        """Read the request and let it be handled; None when it never came to its end. Raises HTTPError, Disconnected."""
        server = self._server
        head = await self._read_head()
        if head is None:
            return None
        self._since = trio.current_time()
        read = read_head(head, server.limits.header_count)
        request = self._request = Request(
            method=read.method,
            target=read.target,
            headers=read.headers,
            version=read.version,
            peer=self._connection.peer,
        )
        if read.length is not None and read.length > server.limits.body_bytes:
            raise too_large(server.limits.body_bytes)
        if read.length == 0:
            self._unread = False
        admitted = server.admit(request)
        self._account = admitted.account
        if read.length != 0:
            if read.headers.get("expect") is not None and read.version == "1.1" and not self._connection.buffer:
                await self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.body = await (self._read_chunks(head) if read.length is None else self._read_body(read.length))
            self._unread = False
        answer = await server.handler(request, admitted)
        while isinstance(answer, WhileConnected):
            answer = await self._while_connected(answer.work)
        if isinstance(answer, WebSocketUpgrade | TunnelUpgrade):
            request.require_websocket()
        return answer

    async def _while_connected(self, work: Callable[[], Awaitable[AnyResponse]]) -> AnyResponse:
        """Find the answer, cancelled when the client goes away. Raises what `work` raises, and Disconnected."""
        found: list[AnyResponse] = []

        async def find() -> None:
            found.append(await work())

        await self._watched(find)
        return found[0]

    # ---- reading

    async def _read_head(self) -> bytes | None:
        """Give the request's head; None if the client goes away before its end. Raises HTTPError 408, 431, 400."""
        buffer, limits = self._connection.buffer, self._server.limits
        end, looked = head_end(buffer, 0, limits.header_bytes)
        if end < 0:
            with trio.move_on_after(limits.head_seconds) as scope:
                while end < 0:
                    if not await self._connection.fill():
                        return None
                    end, looked = head_end(buffer, looked, limits.header_bytes)
            if scope.cancelled_caught:
                raise HTTPError(408, f"the request head was not complete in {limits.head_seconds:g} seconds")
        return self._connection.take(end)

    async def _read_body(self, length: int) -> bytes:
        """Give a body of so many bytes. Raises HTTPError 408, and Disconnected."""
        buffer = self._connection.buffer
        if len(buffer) < length:
            await self._read_until(lambda: len(buffer) >= length, lambda: len(buffer))
        return self._connection.take(length)

    async def _read_chunks(self, head: bytes) -> bytes:
        """Give a body in chunks. Raises HTTPError 408, 400, 413, and Disconnected."""
        buffer = self._connection.buffer
        chunks, parts, size = Chunked(self._server.limits.body_bytes), list[bytes](), 0
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._server.limits.header_bytes)
        parser.receive_data(head)

        def is_complete() -> bool:
            nonlocal size
            if ready := chunks.advance(buffer):  # nothing at all would be the end of the stream to h11
                parser.receive_data(self._connection.take(ready))
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.EndOfMessage):
                    return True
                if isinstance(event, h11.Data):
                    parts.append(event.data)
                    size += len(event.data)
            return False

        try:
            await self._read_until(is_complete, lambda: size)
        except h11.RemoteProtocolError as error:
            raise HTTPError(400, f"the request is not HTTP/1.1: {error}") from None
        return b"".join(parts)

    async def _read_until(self, is_complete: Callable[[], bool], size: Callable[[], int]) -> None:
        """Read until a body is complete, whose `size` so far earns it time. Raises HTTPError 408, and Disconnected."""
        limits = self._server.limits
        start = trio.current_time() + limits.body_seconds
        with trio.CancelScope(deadline=start) as scope:
            while not is_complete():
                scope.deadline = start + size() / BODY_RATE
                if not await self._connection.fill():
                    raise Disconnected("the body was not complete")
            return
        raise HTTPError(408, f"the body was not complete in {limits.body_seconds:g} seconds")

    # ---- writing

    def _head(self, answer: Response | Stream, framing: str, keep: bool) -> bytes:
        """Give the head of an answer. Raises ValueError for a header that is none, or not the handler's to give."""
        lines = [
            f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '')}\r\nDate: {self._server.date()}\r\n{_ALWAYS}"
        ]
        for name, value in answer.headers:
            line = f"{name}: {value}\r\n"
            if not _HEADER.fullmatch(line):
                raise ValueError(f"an answer has the header {line!r}")
            lines.append(line)
        end = "\r\n" if keep else "Connection: close\r\n\r\n"
        return f"{''.join(lines)}{framing}{end}".encode("latin-1")

    def _keeps(self) -> bool:
        """Whether another request may follow the answer."""
        return self._request is not None and self._request.keep_alive and not self._server.stop.is_set()

    async def _respond(self, answer: Response, *, close: bool = False) -> None:
        unread = self._unread
        keep = not (close or unread) and self._keeps()
        pieces = answer.pieces
        size = sum(map(len, pieces))
        framing = "" if answer.status in (204, 304) else f"Content-Length: {size}\r\n"
        if size:
            framing += f"Content-Type: {answer.content_type}\r\n"
        head = self._head(answer, framing, keep)
        if self._request is not None and self._request.method == "HEAD":
            pieces = ()
        self._begun = True
        try:
            # All at once if it is little; else some pieces at a time, for the others who wait (./run bench api, lists).
            together = max(1, len(pieces) * SEND_BYTES // max(size, 1))
            await self._connection.send(b"".join([head, *pieces[:together]]))
            for start in range(together, len(pieces), together):
                await self._connection.send(b"".join(pieces[start : start + together]))
            self._ended = keep
        finally:
            self._record(answer.status)
        if unread:
            await self._connection.linger()

    async def _respond_piecewise(self, answer: Stream) -> None:
        assert self._request is not None
        chunked, keep = self._request.version == "1.1", self._keeps()
        framing = f"Content-Type: {answer.content_type}\r\n" + "Transfer-Encoding: chunked\r\n" * chunked
        head = self._head(answer, framing, keep)
        broken_off = False

        async def send(piece: bytes) -> None:
            nonlocal broken_off
            if piece:
                broken_off = True
                await self._connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                broken_off = False

        async def produce() -> None:
            nonlocal broken_off
            broken_off = True
            await self._connection.send(head)
            broken_off = False
            await answer.produce(send)

        self._begun = True
        try:
            if self._request.method == "HEAD":
                await self._connection.send(head)
            else:
                await self._watched(produce, until_stop=answer.endless)
                if chunked and not broken_off:
                    await self._connection.send(b"0\r\n\r\n")
            self._ended = keep and not broken_off
        except HTTPError as error:
            # Its status is too late. Without the last chunk the client knows that there should have been more.
            raise Disconnected(f"the answer was cut off: {error.message}") from error
        finally:
            self._record(answer.status)

    async def _watched(self, work: Callable[[], Awaitable[None]], *, until_stop: bool = False) -> None:
        """Do work until it returns, or the server's stop ends it, or the client goes away: then raise Disconnected."""
        gone = ended = False

        async def watch_client() -> None:
            nonlocal gone
            await self._connection.until_gone()
            gone = True
            nursery.cancel_scope.cancel()

        async def watch_stop() -> None:
            await self._server.stop.wait()
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:  # the watchers die with the work, the work with either's news
                nursery.start_soon(watch_client)
                if until_stop:
                    nursery.start_soon(watch_stop)
                await work()
                ended = True
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise sole_exception(group) from None
        if gone and not ended:
            raise Disconnected("the client went away")

    def _record(self, status: int) -> None:
        """Write the request log's line. Never the query: it may hold secrets."""
        request, self._request = self._request, None
        if not self._server.log.isEnabledFor(logging.INFO):
            return
        fields = {
            "method": request.method if request is not None else "-",
            "path": request.path[:LOGGED_PATH] if request is not None else "-",
            "status": status,
            "duration_ms": round((trio.current_time() - self._since) * 1000, 1) if request is not None else 0.0,
            "account": printable(self._account) or "-",
            "peer": self._connection.peer,
        }
        self._server.log.info("request", extra=fields)

    # ---- WebSockets

    async def _websocket(self, answer: WebSocketUpgrade) -> None:
        connection = self._connection
        try:
            early = await self._switch()
            async with (
                open_messages(
                    connection.stream,
                    client=False,
                    early=early,
                    message_queue_size=answer.message_queue_size,
                    max_message_size=answer.max_message_size,
                    receive_buffer_size=answer.receive_buffer_size,
                ) as websocket,
                # The pings and _close_at_stop end with the session.
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._close_at_stop, websocket, nursery.cancel_scope)
                nursery.start_soon(self._ping, websocket, answer.ping_interval)
                try:
                    await answer.session(websocket)
                except* ConnectionClosed:
                    pass
                with trio.move_on_after(CLOSE_SECONDS):
                    await websocket.aclose()
                nursery.cancel_scope.cancel()
        finally:
            self._record(101)
        await connection.linger()

    async def _switch(self) -> bytes:
        """Answer that the connection becomes a WebSocket, and return what the client has sent beyond its request."""
        assert self._request is not None
        accept = wsframes.accept_value(self._request.headers.get("sec-websocket-key") or "")
        self._begun = True
        await self._connection.send(f"{_SWITCHING}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        return self._connection.take(len(self._connection.buffer))

    async def _ping(self, websocket: WebSocketConnection, interval: float) -> None:
        """Ping, so that load balancers keep the connection. A pong may wait behind data, and only the next ping waits for it."""
        with suppress(ConnectionClosed):
            while True:
                await trio.sleep(interval)
                await websocket.ping(secrets.token_bytes(4))  # by itself it would use up numbers that a test has seeded

    async def _tunnel(self, answer: TunnelUpgrade) -> None:
        connection = self._connection
        try:
            early = await self._switch()
            stream = TunnelStream(connection.stream, client=False, early=early, ping_interval=answer.ping_interval)
            async with trio.open_nursery() as nursery:  # what keeps the stream going dies with the session
                nursery.start_soon(stream.run)
                nursery.start_soon(self._close_at_stop, stream, nursery.cancel_scope)
                with suppress(trio.BrokenResourceError):
                    await answer.session(stream)
                await stream.aclose()
                nursery.cancel_scope.cancel()
        finally:
            self._record(101)
        await connection.linger()

    async def _close_at_stop(self, websocket: WebSocketConnection | TunnelStream, scope: trio.CancelScope) -> None:
        await self._server.stop.wait()
        with trio.move_on_after(CLOSE_SECONDS):
            await websocket.aclose(1001, "controller is stopping")
        scope.cancel()


# ---- the server ----------------------------------------------------------------------------------------------------


async def serve(
    handler: Callable[[Request, AdmittedT], Awaitable[AnyResponse]],
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    admit: Callable[[Request], AdmittedT],
    limits: Limits | None = None,
    log: logging.Logger = _logger,
    clock: Callable[[], float] = time.time,
    stop: trio.Event | None = None,
    grace: float = 10.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """AnyResponse the requests that come in over `listeners` by `handler`, until cancelled or until `stop` is set.

    `admit` sees each request before its body is read or asked for, and refuses it by raising HTTPError: the place to
    ask who the client is, so that a stranger can't make the server keep megabytes. The handler gets what `admit`
    returned. `clock` gives seconds since 1970,
    for the header Date. `started()` is called when connections are accepted; the listeners are closed in any case.

    At `stop`: no more connections are accepted, those without a request are closed at once, endless streams end,
    WebSockets are closed with 1001. What is running has `grace` seconds to end, and is cancelled then.
    """
    stop = stop if stop is not None else trio.Event()
    server = _Server(handler, admit, limits or Limits(), log, clock, stop)
    async with trio.open_nursery() as watching:  # ends last
        watching.start_soon(server.end_slow_readers)
        async with trio.open_nursery() as connections:  # one task a connection
            async with trio.open_nursery() as accepting:  # ends first
                accept = partial(trio.serve_listeners, server.connect, list(listeners), handler_nursery=connections)
                await accepting.start(accept)
                task_status.started()
                await stop.wait()
                accepting.cancel_scope.cancel()
            for scope in list(server.idle):
                scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + grace
        watching.cancel_scope.cancel()


def _peer(stream: trio.abc.Stream) -> str:
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if isinstance(transport, trio.SocketStream):
        try:
            name = transport.socket.getpeername()
        except OSError:
            return "-"
        if isinstance(name, tuple):
            return str(name[0])
    return "-"
