"""One request and its answer: reads the head and the body, calls the handler, writes what it returned.

Heads and bodies are bytes of the connection's buffer, parsed by request.py. Bytes that follow a request stay in the
buffer: they are the next request, or the first frames of a WebSocket. After an error the connection goes on only if the
whole request was read.

A connection that becomes a WebSocket or a tunnel is kept for the session, and closed at its end or at the server's
stop. Its messages are exchanged by trio-websocket, the bytes of tunnels by `TunnelStream` (websocket.py).

Answers are written by hand and not by h11, which takes 60 times as long for that (170 microseconds instead of 3,
measured in a bare loop on a busy machine).
"""

from __future__ import annotations

import email.utils
import http
import logging
import re
import secrets
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate
from typing import TypeVar

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.base.nursery import sole_exception, unwrap_groups
from orchard.net import wsframes
from orchard.net.connection import SEND_BYTES, SMALL_BYTES, Connection, Disconnected
from orchard.net.request import (
    AnyResponse,
    BodyPiece,
    ChunkedBody,
    HeaderBlock,
    HTTPError,
    Request,
    Response,
    SlowAdmission,
    Stream,
    TunnelUpgrade,
    WebSocketUpgrade,
    WhileConnected,
    body_too_large,
    error_response,
    find_head_end,
    parse_head,
)
from orchard.net.websocket import CLOSE_SECONDS, TunnelStream, open_messages

# A body gets one second more for each so many bytes. No client on a usable network is slower.
_BODY_RATE = 4096
# A body of an operation that takes none is ignored up to this size, because some clients send "{}" or "null" with
# everything. A larger one is refused.
_IGNORED_BODY_BYTES = 4 * 1024
# Bytes that a client may have under way when its WebSocket is closed. No whole body follows.
_WEBSOCKET_LINGER_BYTES = 256 * 1024
# A longer path is cut in the request log.
_LOGGED_PATH = 256  # characters
# No standard status says that the client went away before the answer.
_CLIENT_GONE = 499

_ALWAYS = "Server: orchard\r\nX-Content-Type-Options: nosniff\r\n"
# For an answer whose own headers do not say whether it may be cached.
_NOT_STORED = "Cache-Control: no-store\r\n"
# Formatted once a second.
_http_date = lru_cache(maxsize=1)(partial(email.utils.formatdate, usegmt=True))
_REASONS = {int(status): status.phrase for status in http.HTTPStatus}
# A header that a handler may add: one line (RFC 9110, section 5), and not one that says where the answer ends.
_HEADER = re.compile(r"(?!content-length:|transfer-encoding:)[A-Za-z0-9-]+: [\t -~\x80-\xff]*\r\n", re.IGNORECASE)
_SWITCHING_PROTOCOLS = 101
_SUCCESSES = range(200, 400)
# One read from a WebSocket that carries messages.
_RECEIVE_BYTES = 64 * 1024
_UPGRADED = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"

_logger = logging.getLogger("orchard.net")

ResultT = TypeVar("ResultT")


class Exchange:
    """One request and its answer. `run` is called once; `fail` after it raised, `end` in any case."""

    __slots__ = (
        "_connection",
        "_ended",
        "_keep_alive",
        "_release",
        "_request",
        "_routine",
        "_server",
        "_since",
        "_status",
        "_unread",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._server = connection.server
        self._request: Request | None = None
        self._release: Callable[[], None] | None = None
        # Whether the answer says that the request is routine, for the request log.
        self._routine = False
        # When the head was complete; negative when the request was logged.
        self._since = 0.0
        # Whether the client lets another request follow; once the answer has begun, whether one may.
        self._keep_alive = False
        # Whether bytes of the request may be unread, or its end is unknown.
        self._unread = True
        # The answer's status, once a part of the answer may have been sent.
        self._status = 0
        # Whether all of the answer was sent, and its end is known.
        self._ended = False

    async def run(self) -> bool:
        """Read a request and answer it. Return whether another one may follow. Raises Disconnected."""
        try:
            try:
                answer = await self._handle()
            except BaseExceptionGroup as group:
                raise sole_exception(group) from None
        except HTTPError as error:
            answer = error_response(error)
        # Asked last, because the handler, the admission and their errors have read the state.
        if answer is not None and (refusal := self._server.service.refuse_all()) is not None:
            self._keep_alive = False
            answer = error_response(refusal)
        if isinstance(answer, Response):
            await self._respond(answer)
        elif isinstance(answer, Stream):
            await self._respond_in_pieces(answer)
        elif isinstance(answer, WebSocketUpgrade | TunnelUpgrade):
            await self._upgrade(answer)
        else:
            return False
        self.end()
        if self._status == _SWITCHING_PROTOCOLS:
            await self._connection.linger(_WEBSOCKET_LINGER_BYTES)
        elif self._unread:
            await self._connection.linger()
        return self._ended

    async def fail(self, error: HTTPError) -> None:
        """Answer with an error unless an answer was begun, and end the connection. Raises Disconnected."""
        self._unread = True
        if not self._status:
            await self._respond(error_response(error))
        self.end()
        await self._connection.linger()

    def end(self) -> None:
        """Release what the answer holds, and count and log the request, once. The query, which may hold secrets, is not logged."""
        if self._release is not None:
            self._release()
        request, since = self._request, self._since
        if since < 0 or not (request or self._status):
            return
        self._since = -1.0
        self._server.service.count(request, self._status or _CLIENT_GONE)
        # Reads and heartbeats would fill the log, and so would an attacker that guesses credentials. The limit itself
        # logs who guesses.
        is_read = request is not None and request.method in ("GET", "HEAD") and self._status in _SUCCESSES
        is_minor = is_read or self._routine or self._status == http.HTTPStatus.TOO_MANY_REQUESTS
        level = logging.DEBUG if is_minor else logging.INFO
        if not _logger.isEnabledFor(level):
            return
        fields = {
            "method": request.method if request is not None else "-",
            "path": request.path[:_LOGGED_PATH] if request is not None else "-",
            "status": self._status or _CLIENT_GONE,
            "duration_ms": round((trio.current_time() - since) * 1000, 1) if request is not None else 0.0,
            "account": request.account or "-" if request is not None else "-",
            "peer": self._connection.peer,
        }
        _logger.log(level, "request", extra=fields)

    # ---- reading

    async def _handle(self) -> AnyResponse | None:
        """Read the request and call the handler. Return None if the client went away before the end of the head.

        Raises HTTPError, Disconnected.
        """
        server = self._server
        raw = await self._read_head()
        if raw is None:
            return None
        self._since = trio.current_time()
        request, block = parse_head(raw, server.limits.header_count, self._connection.peer)
        self._request = request
        self._keep_alive = block.keep_alive
        self._unread = block.length != 0
        admission = server.service.admit(request)
        admitted = await self._watched(admission.work) if isinstance(admission, SlowAdmission) else admission
        assert admitted is not None
        if admitted.authenticated:
            server.unauthenticated.remove(self._connection)
        if self._unread:
            limit = admitted.body_limit
            body = await self._read_body(raw, block, limit or _IGNORED_BODY_BYTES)
            request.body = body if limit else b""
            self._unread = False
        answer: AnyResponse | None = await server.service.handler(request, admitted)
        while isinstance(answer, WhileConnected):
            answer = await self._watched(answer.work, until_stop=answer.endless)
            if answer is None:
                raise HTTPError(503, "the server is stopping", (("Retry-After", "1"),))
        if isinstance(answer, TunnelUpgrade):
            self._release = answer.release
        if isinstance(answer, WebSocketUpgrade | TunnelUpgrade):
            request.require_websocket()
        return answer

    async def _read_head(self) -> bytes | None:
        """Return the request's head, None if the client goes away before its end. Raises HTTPError 408, 414, 431, 400."""
        buffer, limits, heads = self._connection.buffer, self._server.limits, self._server.heads
        end, searched = find_head_end(buffer, 0, limits.header_bytes)
        if end < 0:
            try:
                with trio.move_on_after(limits.head_seconds) as scope:
                    while end < 0:
                        heads.grow(self._connection, len(buffer))
                        if not await self._connection.fill():
                            return None
                        end, searched = find_head_end(buffer, searched, limits.header_bytes)
            finally:
                heads.end(self._connection)
            if scope.cancelled_caught:
                raise HTTPError(408, f"the request head was not complete within {limits.head_seconds:g} seconds")
        # RFC 9112, section 2.2: one empty line may precede it.
        return self._connection.take(end).removeprefix(b"\r\n")

    async def _read_body(self, head: bytes, block: HeaderBlock, limit: int) -> bytes:
        """Return the body of a request that has one. Raises HTTPError 408, 400, 413, 431, and Disconnected."""
        connection, length = self._connection, block.length
        if length is not None and length > limit:
            raise body_too_large(limit)
        if block.expects_continue and not connection.buffer:
            await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is not None:
            if len(connection.buffer) < length:
                await self._read_until(lambda: len(connection.buffer) >= length, lambda: len(connection.buffer))
            return connection.take(length)
        body = ChunkedBody(head, limit, self._server.limits.header_bytes)

        def is_complete() -> bool:
            if not connection.buffer:
                return False
            following = body.feed(connection.take())
            connection.buffer += following or b""
            return following is not None

        await self._read_until(is_complete, lambda: body.size)
        return body.content

    async def _read_until(self, is_complete: Callable[[], bool], size: Callable[[], int]) -> None:
        """Read until a body is complete. `size` returns its bytes so far, which earn it time.

        Raises HTTPError 408, and Disconnected.
        """
        connection, limits, bodies = self._connection, self._server.limits, self._server.bodies
        start = trio.current_time() + limits.body_seconds
        try:
            with trio.CancelScope(deadline=start) as scope:
                while not is_complete():
                    read = size()
                    bodies.grow(connection, read)
                    scope.deadline = start + read / _BODY_RATE
                    if not await connection.fill():
                        raise Disconnected("the client closed the connection before the end of the body")
                return
        finally:
            bodies.end(connection)
        raise HTTPError(408, f"the body was not complete within {limits.body_seconds:g} seconds")

    # ---- writing

    def _head(self, answer: Response | Stream, framing: str) -> bytes:
        """Return the head of an answer, and decide whether another request may follow.

        Raises ValueError for an illegal header, or one that only the server may set.
        """
        self._keep_alive = self._keep_alive and not self._unread and not self._server.stop.is_set()
        date = _http_date(int(time.time()))
        lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '')}\r\nDate: {date}\r\n{_ALWAYS}"]
        for name, value in answer.headers:
            line = f"{name}: {value}\r\n"
            if not _HEADER.fullmatch(line):
                raise ValueError(f"the answer has the header {line!r}, expected one line without framing")
            lines.append(line)
        if not any(name == "Cache-Control" for name, _ in answer.headers):
            lines.append(_NOT_STORED)
        end = "\r\n" if self._keep_alive else "Connection: close\r\n\r\n"
        return f"{''.join(lines)}{framing}{end}".encode("latin-1")

    async def _respond(self, answer: Response) -> None:
        pieces = (answer.body,) if isinstance(answer.body, bytes) else answer.body
        # Where each piece would end without separators.
        ends = list(accumulate(map(len, pieces)))
        size = ends[-1] + len(answer.separator) * (len(pieces) - 1) if ends else 0
        framing = "" if answer.status in (204, 304) else f"Content-Length: {size}\r\n"
        if size:
            framing += f"Content-Type: {answer.content_type}\r\n"
        head = self._head(answer, framing)
        self._status, self._routine = answer.status, answer.routine
        if self._request is not None and self._request.method == "HEAD":
            await self._connection.send(head)
        elif size <= SMALL_BYTES:
            await self._connection.send(head + answer.separator.join(pieces))
        else:
            await self._send_blocks(head, pieces, ends, answer.separator)
        self._ended = self._keep_alive

    async def _send_blocks(self, head: bytes, pieces: Sequence[bytes], ends: Sequence[int], separator: bytes) -> None:
        """Send a large answer some pieces at a time, so that others get their turn and little is copied."""
        start = sent = 0
        before = head
        while start < len(pieces):
            stop = max(start + 1, bisect_right(ends, sent + SEND_BYTES))
            if stop == start + 1:
                await self._connection.send(before)
                await self._connection.send(pieces[start])
            else:
                block = [before + pieces[start], *pieces[start + 1 : stop]]
                await self._connection.send_joined(block, ends[stop - 1] - sent, separator)
            start, sent, before = stop, ends[stop - 1], separator

    async def _respond_in_pieces(self, answer: Stream) -> None:
        assert self._request is not None
        chunked = self._request.version == "1.1"
        # X-Accel-Buffering makes nginx, and proxies that follow it, pass each piece on as it comes.
        framing = f"Content-Type: {answer.content_type}\r\nX-Accel-Buffering: no\r\n"
        framing += "Transfer-Encoding: chunked\r\n" * chunked
        head = self._head(answer, framing)
        sender = _PieceSender(self._connection, chunked=chunked)

        async def produce() -> None:
            sender.torn = True
            await self._connection.send(head)
            sender.torn = False
            await answer.produce(sender)

        self._status = answer.status
        try:
            if self._request.method == "HEAD":
                await self._connection.send(head)
            else:
                await self._watched(produce, until_stop=answer.endless)
                if chunked and not sender.torn:
                    await self._connection.send(b"0\r\n\r\n")
            self._ended = self._keep_alive and not sender.torn
        except HTTPError as error:
            # The status was sent already. Without the last chunk the client knows that the answer is incomplete.
            raise Disconnected(f"the answer was cut off: {error.message}") from error

    async def _watched(self, work: Callable[[], Awaitable[ResultT]], *, until_stop: bool = False) -> ResultT | None:
        """Return what work returns; None if, with `until_stop`, the server stops before that.

        Raises what the work raises; Disconnected if the client goes away first, which cancels the work.
        """
        result: ResultT | None = None
        gone = ended = False

        async def watch_client() -> None:
            nonlocal gone
            await self._connection.until_gone()
            gone = True
            nursery.cancel_scope.cancel()

        async def watch_stop() -> None:
            await self._server.stop.wait()
            nursery.cancel_scope.cancel()

        # The watchers end with the work.
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_client)
                if until_stop:
                    nursery.start_soon(watch_stop)
                result = await work()
                ended = True
                nursery.cancel_scope.cancel()
        if gone and not ended:
            raise Disconnected("the client went away")
        return result

    async def _upgrade(self, answer: WebSocketUpgrade | TunnelUpgrade) -> None:
        assert self._request is not None
        self._status = _SWITCHING_PROTOCOLS
        accept = wsframes.accept_value(self._request.headers.get("sec-websocket-key") or "")
        await self._connection.send(f"{_UPGRADED}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        # What the client has sent beyond its request.
        early = self._connection.take()
        if isinstance(answer, WebSocketUpgrade):
            await _run_websocket(self._connection, answer, early)
        else:
            await _run_tunnel(self._connection, answer, early)


class _PieceSender:
    """Sends the body of a Stream (`SendPiece`)."""

    __slots__ = ("_chunked", "_connection", "_rest", "torn")

    def __init__(self, connection: Connection, *, chunked: bool) -> None:
        self._connection = connection
        self._chunked = chunked
        # What `now` has not begun to send.
        self._rest: BodyPiece = b""
        # Whether a write was begun and not completed, so that nothing more may be sent.
        self.torn = False

    def _check(self) -> None:
        """Raise HTTPError if `refuse_all` forbids every answer now."""
        if (refusal := self._connection.server.service.refuse_all()) is not None:
            raise refusal

    def now(self, piece: BodyPiece) -> bool:
        """As SendPiece.now."""
        if isinstance(piece, tuple) or not 0 < len(piece) <= SMALL_BYTES:
            self._rest = piece
            return False
        self._check()
        self.torn = True
        self.torn = not self._connection.send_now(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        return not self.torn

    async def __call__(self, piece: BodyPiece) -> None:
        """As SendPiece.__call__."""
        self._check()
        if self.torn:
            await self._connection.send(b"")
            self.torn = False
        if self._rest:
            rest, self._rest = self._rest, b""
            await self._send(rest)
        await self._send(piece)

    async def _send(self, piece: BodyPiece) -> None:
        parts = tuple(filter(None, piece)) if isinstance(piece, tuple) else (piece,)
        if size := sum(map(len, parts)):
            self.torn = True
            if self._chunked:
                parts = (b"%x\r\n" % size, *parts, b"\r\n")
            if size <= SEND_BYTES:
                await self._connection.send_joined(parts, size)
            else:
                # Other watchers may be sent the same parts, so they are not copied.
                for part in parts:
                    await self._connection.send(part)
            self.torn = False


# ---- WebSockets and tunnels -------------------------------------------------------------------------------------------


async def _run_websocket(connection: Connection, answer: WebSocketUpgrade, early: bytes) -> None:
    """Run a session over WebSocket messages, then close the WebSocket."""
    async with (
        open_messages(
            connection.stream.as_stream(),
            client=False,
            early=early,
            # The client has to wait while a message waits for the session.
            message_queue_size=1,
            max_message_size=answer.max_message_size,
            receive_buffer_size=_RECEIVE_BYTES,
        ) as websocket,
        # The pings and _close_at_stop end with the session.
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_close_at_stop, connection.server.stop, websocket, nursery.cancel_scope)
        nursery.start_soon(_ping, websocket, answer.ping_interval)
        try:
            await answer.session(websocket)
        except* ConnectionClosed:
            pass
        with trio.move_on_after(CLOSE_SECONDS):
            await websocket.aclose()
        nursery.cancel_scope.cancel()


async def _run_tunnel(connection: Connection, answer: TunnelUpgrade, early: bytes) -> None:
    """Run a session over the bytes of WebSocket messages, then close the WebSocket."""
    stream = TunnelStream(
        connection.stream.as_stream(),
        client=False,
        early=early,
        ping_interval=answer.ping_interval,
        text=answer.text,
    )
    # The stream's own tasks and _close_at_stop end with the session.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        nursery.start_soon(_close_at_stop, connection.server.stop, stream, nursery.cancel_scope)
        with suppress(trio.BrokenResourceError):
            await answer.session(stream)
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def _ping(websocket: WebSocketConnection, interval: float) -> None:
    """Ping, so that load balancers keep the connection.

    A pong may come late, behind data, and only the next ping waits for it.
    """
    with suppress(ConnectionClosed):
        while True:
            await trio.sleep(interval)
            # Without a payload of ours trio-websocket would draw one from `random`, which an embedding program may seed.
            await websocket.ping(secrets.token_bytes(4))


async def _close_at_stop(
    stop: trio.Event, websocket: WebSocketConnection | TunnelStream, scope: trio.CancelScope
) -> None:
    await stop.wait()
    with trio.move_on_after(CLOSE_SECONDS):
        await websocket.aclose(1001, "controller is stopping")
    scope.cancel()
