"""One end of a WebSocket as a stream of bytes: the data path of tunnels. Law: reads and writes the stream it is given.

trio-websocket takes messages apart and puts them together, which is what watches and commands need. A tunnel has no
messages, only bytes that are to be somewhere else: here each part of a payload goes on as soon as it has come, in a frame
of its own, and nothing but the headers is looked at (wsframes.py). The handshake is HTTP and has happened already, by
those who read HTTP anyway (httpd.py, transport.py); what they read beyond it comes in as `early`.

`TunnelStream.run` has three tasks. One reads, up to `READ_AHEAD` bytes more than were taken: so a ping is seen, and a
close, though whoever uses the stream is busy, and a peer that sends faster than that is made to wait. The second sends
pings and pongs. It is another one because a peer that takes nothing for a while must still be read from: what it has to
take may depend on what it sends. The third looks whether the peer is still there, whatever the others wait for. Whoever
sends holds a lock for the time of a frame.

A frame that was not sent to its end (its task was cancelled) is the last one: what followed would be taken for the rest of
its payload.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
from trio_websocket import WebSocketConnection, wrap_client_stream, wrap_server_stream

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
from orchard.nursery import unwrap_groups

PING_INTERVAL = 30.0  # seconds; shorter than the idle time-out of common load balancers, 60
RECEIVE_BYTES = 128 * 1024  # of one read; twice as many gain nothing
READ_AHEAD = 128 * 1024  # bytes that were received and not taken; one read may come on top
PART_BYTES = 256  # that a part of them takes beside its own and that count, else a byte a packet would take megabytes
WORTHWHILE = 64 * 1024  # bytes; with less, who takes them looks whether more are there: TLS comes in records of 16 KiB
SEND_BYTES = 128 * 1024  # of one write: so long another one has to wait, a pong for example
FRAME_BYTES = 64 * 1024  # of one message that is sent: many clients have a limit to what they take
CLOSE_SECONDS = 5.0  # for the other end to take a close, and to answer that it closes


class TunnelStream(trio.abc.Stream):
    """The bytes of a WebSocket as a stream. Closing it closes the WebSocket; there is no half-close.

    `client` says which end this is. Every `ping_interval` seconds it pings; a peer that says nothing for another one
    is lost, unless data is what it waits behind and its system goes on answering. Raises BrokenResourceError when the
    other end has gone, with its reason. `run` must run meanwhile, in a nursery of whoever closes `stream` afterwards.
    """

    def __init__(
        self, stream: trio.abc.Stream, *, client: bool, early: bytes = b"", ping_interval: float = PING_INTERVAL
    ) -> None:
        self.closed: Close | None = None  # how, as soon as either end has closed
        self._stream = stream
        self._client = client
        self._ping_interval = ping_interval
        self._frames = wsframes.FrameReader(masked=not client)
        self._early = early
        self._parts: list[Bytes] = []  # what was received and not taken
        self._ahead = 0  # bytes of them
        self._taken = trio.lowlevel.ParkingLot()  # the reader, as long as there are too many
        self._come = trio.lowlevel.ParkingLot()  # who waits for some
        self._lock = trio.Lock()  # of whoever sends a frame
        self._torn = False  # whether a frame is on its way, or was left so
        self._heard = 0  # reads that gave something
        self._sent = 0  # frames of data
        self._pong: bytes | None = None  # to be sent; an older one need not be
        self._ping = False  # to be sent
        self._due = trio.Event()  # that there is one of them
        self._done = trio.Event()  # nothing more is received

    # -- the stream's tasks

    async def run(self) -> None:
        """Receive, answer and ping, until the WebSocket is closed."""
        try:
            async with trio.open_nursery() as nursery:  # the others die with who reads
                nursery.start_soon(self._send_control)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._end(Close(ABNORMAL))
            self._done.set()

    async def _read(self) -> None:
        data: Bytes = self._early
        while True:
            parts: list[Bytes] = []
            close: Close | None = None
            for event in self._frames.feed(data):
                match event:
                    case Ping(payload):
                        self._pong = payload
                        self._due.set()
                    case Pong():
                        pass  # that something came was seen
                    case Close():
                        close = event
                    case _:
                        parts.append(event)
            if parts:
                self._put(parts[0] if len(parts) == 1 else b"".join(parts))
            if close is not None:
                self._end(close)
                await self._say(close)
                return
            while self._full():
                await self._taken.park()
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            self._heard += 1

    async def _send_control(self) -> None:
        while True:
            await self._due.wait()
            self._due = trio.Event()
            if self._pong is not None:
                pong, self._pong = self._pong, None
                await self._control(wsframes.PONG, pong)
            if self._ping:
                self._ping = False
                await self._control(wsframes.PING, b"")

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Have a ping sent now and then. Cancel `scope` when the peer is dead."""
        before: tuple[int, int] | None = None
        while True:
            await trio.sleep(self._ping_interval)
            now = self._heard, self._sent
            if before is not None and now[0] == before[0] and self._dead(busy=now[1] != before[1]):
                self._end(Close(ABNORMAL, "does not answer to pings"))
                await self._say(Close(INTERNAL_ERROR, "pings are not answered"))
                if self._lock.locked():  # whoever sends would wait for ever
                    await trio.aclose_forcefully(self._stream)
                scope.cancel()
            before = now
            self._ping = True
            self._due.set()

    def _dead(self, busy: bool) -> bool:
        """Judge a peer that has said nothing for an interval: its pong may be behind data, in either direction."""
        unacknowledged = tcp.unacknowledged(self._stream)
        if unacknowledged.silent_seconds >= self._ping_interval:
            return True
        return not (busy or unacknowledged.pending or self._lock.locked() or self._full())

    # -- receiving

    def _put(self, part: Bytes) -> None:
        if self.closed is None:
            self._parts.append(part)
            self._ahead += len(part) + PART_BYTES
            self._come.unpark_all()

    def _full(self) -> bool:
        return self._ahead >= READ_AHEAD

    def _end(self, close: Close) -> None:
        if self.closed is None:
            self.closed = close
            self._come.unpark_all()

    async def take(self) -> Bytes:
        """Give all that has come, at least a byte; nothing when the WebSocket is closed, as `closed` says."""
        while not self._parts:
            if self.closed is not None:
                return b""
            await self._come.park()
        before = 0
        while before < self._ahead < WORTHWHILE and self.closed is None:
            before = self._ahead
            await trio.lowlevel.checkpoint()
        parts, self._parts, self._ahead = self._parts, [], 0
        self._taken.unpark_all()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def wait_exhausted(self) -> None:
        """Return when the WebSocket is closed, if nothing that it carried is left to be taken; else never."""
        await self._done.wait()
        if self._parts:
            await trio.sleep_forever()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Give bytes, b"" when the other end has closed as it should."""
        await trio.lowlevel.checkpoint()
        data = await self.take()
        if not data and self.closed is not None and self.closed.code not in (NORMAL, NO_STATUS):
            raise trio.BrokenResourceError(why(self.closed))
        if max_bytes is not None and len(data) > max_bytes:
            self._parts.insert(0, memoryview(data)[max_bytes:])
            self._ahead += len(data) - max_bytes + PART_BYTES
            data = memoryview(data)[:max_bytes]
        return bytes(data)

    # -- sending

    async def send_all(self, data: Bytes) -> None:
        """Send bytes, in as many messages as they take. Raises BrokenResourceError."""
        view = memoryview(data)
        for start in range(0, len(view), SEND_BYTES):
            if self.closed is not None:
                raise trio.BrokenResourceError(why(self.closed))
            await self._send(wsframes.BINARY, view[start : start + SEND_BYTES])
            self._sent += 1

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def _send(self, opcode: int, payload: Bytes) -> None:
        """Send a frame, if the one before was sent to its end. Raises BrokenResourceError."""
        async with self._lock:
            if self._torn:
                raise trio.BrokenResourceError("a frame was not sent to its end")
            self._torn = True
            parts: list[Bytes] = []
            for start in range(0, len(payload) or 1, FRAME_BYTES):
                key = os.urandom(4) if self._client else None
                parts += wsframes.build_frame(opcode, payload[start : start + FRAME_BYTES], key)
            try:
                await self._stream.send_all(b"".join(parts))
            except trio.ClosedResourceError as error:  # meanwhile, because the peer is dead
                raise trio.BrokenResourceError(str(error)) from error
            self._torn = opcode == wsframes.CLOSE  # nothing may follow it

    async def _control(self, opcode: int, payload: bytes) -> None:
        with suppress(trio.BrokenResourceError):  # whoever reads will see that it is the end
            await self._send(opcode, payload)

    async def _say(self, close: Close) -> None:
        with trio.move_on_after(CLOSE_SECONDS):
            await self._control(wsframes.CLOSE, wsframes.close_payload(close.code, close.reason))

    async def aclose(self, code: int = NORMAL, reason: str = "") -> None:
        """Close: send what is under way to its end, then why, and wait for the other end to close, all within a time."""
        first = self.closed is None
        self._end(Close(code, reason))
        if first:
            self._parts, self._ahead = [], 0
            self._taken.unpark_all()
        with trio.move_on_after(CLOSE_SECONDS):
            if first:
                await self._say(Close(code, reason))
            await self._done.wait()


def why(close: Close) -> str:
    """Say in a few words how a WebSocket was closed."""
    if close.code == ABNORMAL:
        return f"the peer {close.reason}" if close.reason else "the connection was lost"
    return f"closed with {close.code}: {close.reason}" if close.reason else f"closed with {close.code}"


# ---- messages ------------------------------------------------------------------------------------------------------

_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: orchard\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
_ANSWER = "HTTP/1.1 101 \r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n"
_KEY_HEADER = b"sec-websocket-key:"


@asynccontextmanager
async def open_messages(
    stream: trio.abc.Stream,
    *,
    client: bool,
    early: bytes,
    message_queue_size: int,
    max_message_size: int,
    receive_buffer_size: int | None,
) -> AsyncIterator[WebSocketConnection]:
    """Run trio-websocket on a stream whose WebSocket handshake has happened, for the time of the block.

    `client` says which end this is, `early` are the bytes that were read beyond the handshake. The sizes are those of
    `trio_websocket`. At the end of the block the WebSocket is closed within `CLOSE_SECONDS`; `stream` stays open, and
    is to be closed by the caller. Raises what the block raises, without the group of a nursery.
    """
    established = _EstablishedStream(stream, client=client, early=early)
    try:
        with unwrap_groups():
            # The reader of trio-websocket ends with the block.
            async with trio.open_nursery() as nursery:
                if client:
                    websocket = await wrap_client_stream(
                        nursery,
                        # trio-websocket declares sockets and TLS, and uses what any stream has.
                        established,  # type: ignore[arg-type]
                        "orchard",
                        "/",
                        message_queue_size=message_queue_size,
                        max_message_size=max_message_size,
                        receive_buffer_size=receive_buffer_size,
                    )
                else:
                    proposal = await wrap_server_stream(
                        nursery,
                        established,
                        message_queue_size=message_queue_size,
                        max_message_size=max_message_size,
                        receive_buffer_size=receive_buffer_size,
                    )
                    websocket = await proposal.accept()
                established.opened(websocket)
                yield websocket
                with trio.move_on_after(CLOSE_SECONDS):
                    await websocket.aclose()
                nursery.cancel_scope.cancel()
    finally:
        await established.send_owed_close()


class _EstablishedStream(trio.abc.Stream):
    """A stream whose WebSocket handshake has happened, as trio-websocket reads and writes it.

    trio-websocket begins with a handshake of its own. This stream plays the other side of it and sends none of it, so
    that HTTP is read and written in one place (server.py, transport.py).

    Frames are delivered one at a time, and no more once trio-websocket has begun to close. Its reader would answer to a
    ping even after our own close frame, which its engine refuses with an exception that trio-websocket does not catch.
    The peer's close frame ends the stream then, and with it the wait for that frame.

    Closing this stream leaves the one below open.
    """

    def __init__(self, stream: trio.abc.Stream, *, client: bool, early: bytes) -> None:
        self._stream = stream
        self._client = client
        # The other side of the handshake: what trio-websocket is to read first.
        self._handshake = b"" if client else _REQUEST
        self._handshaken = False
        self._open = trio.Event()
        self._websocket: WebSocketConnection | None = None
        self._received = memoryview(early)
        self._boundaries = wsframes.FrameSplitter()
        self._close_sent = False

    def opened(self, websocket: WebSocketConnection) -> None:
        """Deliver frames from now on."""
        self._websocket = websocket
        self._open.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._handshake:
            await trio.lowlevel.checkpoint()
            handshake, self._handshake = self._handshake, b""
            return handshake
        await self._open.wait()
        assert self._websocket is not None
        while True:
            if not self._received:
                self._received = memoryview(await self._stream.receive_some(max_bytes))
                if not self._received:
                    return b""
            size, opcode = self._boundaries.measure(self._received)
            part, self._received = self._received[:size], self._received[size:]
            # No checkpoint lies between this look and trio-websocket's answer to the frame.
            if self._websocket.closed is None:
                return bytes(part)
            if opcode == wsframes.CLOSE:
                return b""

    async def send_all(self, data: Bytes) -> None:
        if self._handshaken:
            await self._stream.send_all(data)
            # The first byte of a close frame.
            self._close_sent = self._close_sent or data[:1] == b"\x88"
            return
        self._handshaken = True
        if self._client:
            lines = bytes(data).split(b"\r\n")
            (key,) = (line[len(_KEY_HEADER) :].strip() for line in lines if line.lower().startswith(_KEY_HEADER))
            self._handshake = _ANSWER.format(wsframes.accept_value(key.decode())).encode()
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.send_owed_close()

    async def send_owed_close(self) -> None:
        """Send the close frame that trio-websocket owes a peer which broke the protocol. Waits `CLOSE_SECONDS` at most."""
        reason = self._websocket.closed if self._websocket is not None else None
        if reason is None or reason.code not in (PROTOCOL_ERROR, INVALID_PAYLOAD) or self._close_sent:
            await trio.lowlevel.checkpoint()
            return
        key = os.urandom(4) if self._client else None
        close = wsframes.build_frame(wsframes.CLOSE, wsframes.close_payload(reason.code, ""), key)
        with (
            trio.move_on_after(CLOSE_SECONDS),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
        ):
            await self.send_all(b"".join(close))
