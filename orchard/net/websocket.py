"""WebSockets after their handshake: as a stream of bytes (`TunnelStream`) and as messages (`open_messages`).

The handshake is HTTP, so exchange.py and transport.py do it. Bytes that they read beyond it are passed in as `early`.
Frames are built and read by wsframes.py.

A tunnel carries bytes whose message boundaries mean nothing. `TunnelStream` passes each part of a payload on as soon as
it has arrived, and chooses the frames that it sends by itself. `TunnelStream.run` has three tasks:
- The first reads up to `_READ_AHEAD_BYTES` before they are taken. So pings and a close are seen while the user of the
  stream is busy, and a peer that sends more has to wait.
- The second sends pings and pongs. Sending may block while the peer reads nothing, and the peer may read only after it
  has sent something, so the first task must go on reading meanwhile.
- The third ends the stream if the peer is dead, whatever the other two wait for.

A sender holds a lock for the time of one write. After a frame that was not sent to its end (its task was cancelled)
nothing more is sent, because the peer would take it for the rest of the payload.

Everything else (watches, commands) is messages, and trio-websocket reads and writes those.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

from orchard.base.nursery import Wakeup, unwrap_groups
from orchard.net import tcp, wsframes
from orchard.net.wsframes import (
    ABNORMAL,
    INTERNAL_ERROR,
    INVALID_PAYLOAD,
    NO_STATUS,
    NORMAL,
    PROTOCOL_ERROR,
    Bytes,
    Close,
    Ping,
    Pong,
)

# Below the shortest idle limit that is common among proxies and load balancers, 30 seconds.
PING_INTERVAL = 20.0  # seconds
# How long a close waits for the peer to take the close frame and to answer it.
CLOSE_SECONDS = 5.0

# The size of one read. A tunnel is not faster with twice as much.
_RECEIVE_BYTES = 128 * 1024
# Reading pauses when so many bytes wait to be taken. The last read may exceed this by its own size.
_READ_AHEAD_BYTES = 128 * 1024
# Bookkeeping overhead charged per part, so that one-byte packets cannot use unbounded memory.
_PART_BYTES = 256
# With less than this buffered, `take` first lets the reader read more. TLS arrives in records of 16 KiB.
_WORTHWHILE_BYTES = 64 * 1024
# The size of one write. Another sender, of a pong for example, waits that long.
_SEND_BYTES = 128 * 1024
# The size of one message. Many clients have a limit to what they accept.
_FRAME_BYTES = 64 * 1024


# ---- bytes ---------------------------------------------------------------------------------------------------------


class _Received:
    """Bytes that were received and not taken yet, and how the peer or this end closed the WebSocket after them."""

    def __init__(self) -> None:
        self.close: Close | None = None
        self.parts: list[Bytes] = []
        # Bytes of the parts, and their overhead.
        self.size = 0
        # Bytes of all parts that have arrived so far.
        self.total = 0
        self._room = trio.lowlevel.ParkingLot()
        self._arrived = trio.lowlevel.ParkingLot()

    def put(self, part: Bytes) -> None:
        """Append bytes. After the close, drop them."""
        if self.close is None:
            self.parts.append(part)
            self.size += len(part) + _PART_BYTES
            self.total += len(part)
            self._arrived.unpark_all()

    def put_back(self, part: Bytes) -> None:
        """Insert bytes in front of all others, for a caller of `take` that cannot use all."""
        self.parts.insert(0, part)
        self.size += len(part) + _PART_BYTES

    def end(self, close: Close) -> None:
        """Set the close, if there is none yet."""
        if self.close is None:
            self.close = close
            self._arrived.unpark_all()

    def clear(self) -> None:
        self.parts, self.size = [], 0
        self._room.unpark_all()

    def is_full(self) -> bool:
        return self.size >= _READ_AHEAD_BYTES

    async def wait_room(self) -> None:
        while self.is_full():
            await self._room.park()

    async def take(self) -> Bytes:
        """Remove and return all bytes, at least one; b"" after the close."""
        while not self.parts:
            if self.close is not None:
                return b""
            await self._arrived.park()
        before = 0
        while before < self.size < _WORTHWHILE_BYTES and self.close is None:
            before = self.size
            await trio.lowlevel.checkpoint()
        parts = self.parts
        self.clear()
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _FrameSender:
    """Sends frames over a stream, one payload at a time. `client` says which end this is: a client masks its frames."""

    def __init__(self, stream: trio.abc.Stream, *, client: bool) -> None:
        self._stream = stream
        self._client = client
        self._lock = trio.Lock()
        # Bytes of data that were sent.
        self.total = 0
        # Whether no more frames may be sent: the last one was a close frame, or was not sent to its end.
        self._ended = False

    def is_busy(self) -> bool:
        return self._lock.locked()

    async def send(self, opcode: int, payload: Bytes) -> None:
        """Send a payload in frames of `_FRAME_BYTES`. Raises BrokenResourceError, also after an incomplete frame."""
        async with self._lock:
            if self._ended:
                raise trio.BrokenResourceError("the WebSocket is closed, or a frame was not sent to its end")
            self._ended = True
            parts: list[Bytes] = []
            for start in range(0, len(payload) or 1, _FRAME_BYTES):
                key = os.urandom(4) if self._client else None
                parts += wsframes.build_frame(opcode, payload[start : start + _FRAME_BYTES], key)
            try:
                await self._stream.send_all(b"".join(parts))
            except trio.ClosedResourceError as error:
                # The stream was closed meanwhile because the peer is dead.
                raise trio.BrokenResourceError(str(error)) from error
            self._ended = opcode == wsframes.CLOSE
            if opcode in (wsframes.BINARY, wsframes.TEXT):
                self.total += len(payload)


class TunnelStream(trio.abc.Stream):
    """The bytes of a WebSocket as a stream. Closing it closes the WebSocket; there is no half-close.

    `stream` carries the frames. It stays open, and the caller closes it afterwards. `client` says which end this is.
    `early` are bytes that were read from `stream` beyond the handshake. `text` sends text messages, also of bytes that
    are not UTF-8. A task must run `run` as long as the TunnelStream is used.

    It pings every `ping_interval` seconds. A peer that sends nothing for another interval is dead, unless its answer
    may be waiting behind data and its kernel goes on acknowledging. The methods raise BrokenResourceError, with the
    reason, when the WebSocket was closed other than regularly.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        client: bool,
        early: bytes = b"",
        ping_interval: float = PING_INTERVAL,
        text: bool = False,
    ) -> None:
        self._stream = stream
        self._opcode = wsframes.TEXT if text else wsframes.BINARY
        self._early = early
        self._ping_interval = ping_interval
        self._frames = wsframes.FrameReader(masked=not client)
        self._received = _Received()
        self._sender = _FrameSender(stream, client=client)
        # The numbers of reads that returned something and of writes of data, by which `_watch` notices activity.
        self._reads = 0
        self._sends = 0
        # Pings and pongs to be sent: payloads by opcode. A newer pong replaces one that was not sent yet.
        self._control: dict[int, bytes] = {}
        self._control_due = Wakeup()
        # Set when nothing more is received.
        self._done = trio.Event()

    @property
    def closed(self) -> Close | None:
        """How the WebSocket was closed, by either end; None while it is open."""
        return self._received.close

    @property
    def received_bytes(self) -> int:
        """The bytes that have arrived so far."""
        return self._received.total

    @property
    def sent_bytes(self) -> int:
        """The bytes that were sent so far."""
        return self._sender.total

    # -- the stream's tasks

    async def run(self) -> None:
        """Receive, answer and ping, until the WebSocket is closed."""
        try:
            # The other two tasks end with the one that reads.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_control)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._received.end(Close(ABNORMAL))
            self._done.set()

    async def _read(self) -> None:
        data: Bytes = self._early
        while True:
            if (close := self._handle(data)) is not None:
                self._received.end(close)
                await self._send_close(close)
                return
            await self._received.wait_room()
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            self._reads += 1

    def _handle(self, data: Bytes) -> Close | None:
        """Buffer what arrived and note pings. Return the peer's close."""
        parts: list[Bytes] = []
        close: Close | None = None
        for event in self._frames.feed(data):
            match event:
                case Ping(payload):
                    self._request_control(wsframes.PONG, payload)
                case Pong():
                    # `_reads` has counted it as a sign of life.
                    pass
                case Close():
                    close = event
                case _:
                    parts.append(event)
        if parts:
            self._received.put(parts[0] if len(parts) == 1 else b"".join(parts))
        return close

    def _request_control(self, opcode: int, payload: bytes) -> None:
        self._control[opcode] = payload
        self._control_due.set()

    async def _send_control(self) -> None:
        while True:
            await self._control_due.wait()
            while self._control:
                await self._try_send(*self._control.popitem())

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Ping at every interval, and cancel `scope` when the peer is dead."""
        before: tuple[int, int] | None = None
        while True:
            await trio.sleep(self._ping_interval)
            now = self._reads, self._sends
            if before is not None and now[0] == before[0] and self._is_dead(has_sent=now[1] != before[1]):
                self._received.end(Close(ABNORMAL, "does not answer to pings"))
                await self._send_close(Close(INTERNAL_ERROR, "pings are not answered"))
                # A task that sends would wait for ever.
                if self._sender.is_busy():
                    await trio.aclose_forcefully(self._stream)
                scope.cancel()
            before = now
            self._request_control(wsframes.PING, b"")

    def _is_dead(self, *, has_sent: bool) -> bool:
        """Return whether a peer that sent nothing for an interval is dead. Its pong may be waiting behind data."""
        unacknowledged = tcp.unacknowledged(self._stream)
        if unacknowledged.silent_seconds >= self._ping_interval:
            return True
        return not (has_sent or unacknowledged.pending or self._sender.is_busy() or self._received.is_full())

    # -- receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return bytes, or b"" when the peer has closed regularly. Raises BrokenResourceError after another close."""
        await trio.lowlevel.checkpoint()
        data = await self._received.take()
        if not data and self.closed is not None and self.closed.code not in (NORMAL, NO_STATUS):
            raise trio.BrokenResourceError(describe_close(self.closed))
        if max_bytes is not None and len(data) > max_bytes:
            self._received.put_back(memoryview(data)[max_bytes:])
            data = memoryview(data)[:max_bytes]
        return bytes(data)

    # -- sending

    async def send_all(self, data: Bytes) -> None:
        """Send bytes, in as many messages as they need. Raises BrokenResourceError."""
        view = memoryview(data)
        for start in range(0, len(view), _SEND_BYTES):
            if self.closed is not None:
                raise trio.BrokenResourceError(describe_close(self.closed))
            await self._sender.send(self._opcode, view[start : start + _SEND_BYTES])
            self._sends += 1

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def forward_to(self, sink: TunnelStream) -> None:
        """Send on what arrives until this WebSocket is closed, and drop it after `sink` was closed.

        Each piece is sent on before the next one is taken.
        """
        while data := await self._received.take():
            # The task that reads from the sink notices the sink's close, after the bytes that came before that close.
            with suppress(trio.BrokenResourceError):
                await sink.send_all(data)

    async def _try_send(self, opcode: int, payload: bytes) -> None:
        """Send a frame. If the connection is broken, the reader notices that."""
        with suppress(trio.BrokenResourceError):
            await self._sender.send(opcode, payload)

    async def _send_close(self, close: Close) -> None:
        with trio.move_on_after(CLOSE_SECONDS):
            await self._try_send(wsframes.CLOSE, wsframes.close_payload(close.code, close.reason))

    async def aclose(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the WebSocket, within `CLOSE_SECONDS`.

        A frame that is being sent is sent to its end, then the close frame; then this waits for the peer's. Bytes that
        were received and not taken are dropped.
        """
        is_first = self.closed is None
        self._received.end(Close(code, reason))
        if is_first:
            self._received.clear()
        with trio.move_on_after(CLOSE_SECONDS):
            if is_first:
                await self._send_close(Close(code, reason))
            await self._done.wait()


# ---- messages ------------------------------------------------------------------------------------------------------

_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: orchard\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
_ANSWER = "HTTP/1.1 101 \r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n"
_KEY_HEADER = b"sec-websocket-key:"


@asynccontextmanager
async def open_messages(
    stream: trio.abc.Stream, *, client: bool, early: bytes, **sizes: Any
) -> AsyncIterator[WebSocketConnection]:
    """Run trio-websocket on a stream whose WebSocket handshake has happened, for the time of the block.

    `client` says which end this is. `early` are bytes that were read from `stream` beyond the handshake. The `sizes`
    are arguments of `trio_websocket.wrap_server_stream`: `message_queue_size` in messages, `max_message_size` and
    `receive_buffer_size` in bytes.

    At the end of the block the WebSocket is closed, within `CLOSE_SECONDS`. `stream` stays open, and the caller closes
    it. Raises what the block raises, without the exception group of a nursery.
    """
    established = _EstablishedStream(stream, client=client, early=early)
    try:
        with unwrap_groups():
            # The reader of trio-websocket ends with the block.
            async with trio.open_nursery() as nursery:
                if client:
                    # trio-websocket declares sockets and TLS, but any stream will do.
                    raw: Any = established
                    websocket = await wrap_client_stream(nursery, raw, "orchard", "/", **sizes)
                else:
                    websocket = await (await wrap_server_stream(nursery, established, **sizes)).accept()
                established.deliver_to(websocket)
                yield websocket
                with trio.move_on_after(CLOSE_SECONDS):
                    await websocket.aclose()
                nursery.cancel_scope.cancel()
    finally:
        await established.aclose()


class _EstablishedStream(trio.abc.Stream):
    """A stream whose WebSocket handshake has happened, as trio-websocket reads and writes it.

    trio-websocket begins with a handshake of its own. This stream answers it and sends nothing of it to the peer.

    Frames are delivered one at a time, and none after trio-websocket has begun to close. Its reader would answer a ping
    even after our own close frame, which raises an exception that trio-websocket does not catch. Once trio-websocket
    has begun to close, the peer's close frame ends this stream, and trio-websocket waits no longer for that frame.

    `aclose` leaves the stream below open.
    """

    def __init__(self, stream: trio.abc.Stream, *, client: bool, early: bytes) -> None:
        self._stream = stream
        self._client = client
        # The peer's part of trio-websocket's handshake, which it reads before any frame.
        self._handshake = b"" if client else _REQUEST
        self._handshake_sent = False
        self._websocket: WebSocketConnection | None = None
        self._open = trio.Event()
        self._received = memoryview(early)
        self._splitter = wsframes.FrameSplitter()
        self._close_sent = False
        # Whether trio-websocket sends nothing more.
        self._is_closed = False

    def deliver_to(self, websocket: WebSocketConnection) -> None:
        """Begin to deliver frames, now that `websocket` shows whether trio-websocket has begun to close."""
        self._websocket = websocket
        self._open.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._handshake:
            await trio.lowlevel.checkpoint()
            handshake, self._handshake = self._handshake, b""
            return handshake
        if self._websocket is None:
            await self._open.wait()
            assert self._websocket is not None
        while True:
            if not self._received:
                self._received = memoryview(await self._stream.receive_some(max_bytes))
                if not self._received:
                    return b""
            size, opcode = self._splitter.measure(self._received)
            part, self._received = self._received[:size], self._received[size:]
            # There is no checkpoint between this look and trio-websocket's answer to the frame.
            if self._websocket.closed is None:
                return bytes(part)
            if opcode == wsframes.CLOSE:
                return b""

    async def send_all(self, data: Bytes) -> None:
        if self._handshake_sent:
            # A task sends while the reader closes.
            if self._is_closed:
                raise trio.ClosedResourceError
            await self._stream.send_all(data)
            # The first byte of a close frame.
            self._close_sent = self._close_sent or data[:1] == b"\x88"
            return
        self._handshake_sent = True
        if self._client:
            lines = bytes(data).split(b"\r\n")
            (key,) = (line[len(_KEY_HEADER) :].strip() for line in lines if line.lower().startswith(_KEY_HEADER))
            self._handshake = _ANSWER.format(wsframes.accept_value(key.decode())).encode()
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Send the close frame that trio-websocket omits when the peer broke the protocol. Takes up to CLOSE_SECONDS."""
        self._is_closed = True
        reason = self._websocket.closed if self._websocket is not None else None
        if reason is None or reason.code not in (PROTOCOL_ERROR, INVALID_PAYLOAD) or self._close_sent:
            await trio.lowlevel.checkpoint()
            return
        key = os.urandom(4) if self._client else None
        frame = wsframes.build_frame(wsframes.CLOSE, wsframes.close_payload(reason.code, ""), key)
        with (
            trio.move_on_after(CLOSE_SECONDS),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
        ):
            await self._stream.send_all(b"".join(frame))
            self._close_sent = True


# ---- descriptions --------------------------------------------------------------------------------------------------


def describe_close(close: Close) -> str:
    """Return a phrase for how a WebSocket was closed, for example "closed with 1001: going away"."""
    if close.code == ABNORMAL:
        return f"the peer {close.reason}" if close.reason else "the connection was lost"
    return f"closed with {close.code}: {close.reason}" if close.reason else f"closed with {close.code}"


def describe_disconnect(error: ConnectionClosed) -> str:
    """Return a phrase for how a WebSocket of trio-websocket was closed, in the words of `describe_close`."""
    if error.reason is None:
        return "closed"
    return describe_close(Close(error.reason.code, error.reason.reason or ""))
