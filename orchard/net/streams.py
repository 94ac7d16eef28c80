"""The server's end of an accepted connection, in the clear or over TLS, with the same methods for both.

`PlainStream` and `TLSStream` offer what the connection loop of the server needs beyond a trio stream: read what has
arrived without waiting, send without a cancel scope, close from another task. Over sockets both call the socket
directly, because trio's stream classes check and translate more than is needed here, which small requests would feel.

`TLSStream` drives OpenSSL through two memory buffers (`ssl.MemoryBIO`) instead of using `trio.SSLStream`, which costs
32 microseconds for a small request where this costs 20 and a plain socket 15, measured in a bare loop. OpenSSL's state is
created when the client's first record has arrived, so a connection that sends nothing needs no more memory than a plain
one. A client that begins with plain HTTP is answered in plain HTTP (`early`, connection.py).

Certificates, contexts and the client's side of TLS are in tls.py.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from contextlib import suppress

import trio

from orchard.net import tls

# One read by default: as much as a TLS record holds.
RECEIVE_BYTES = 16 * 1024

# Data is encrypted in records of this size. OpenSSL's memory buffers never shrink, so each stays below 24 KiB.
_RECORD_BYTES = 16 * 1024  # bytes
# Bytes that are encrypted for one write to the socket. This bounds the ciphertext that is held for a slow reader.
# Twice as many would let malloc return the memory and get it back for each write, at 70 page faults each.
_FLUSH_BYTES = 8 * _RECORD_BYTES
# Records of one write to the socket at most; the system takes 1,024. They are not joined first, which would copy them
# once more.
_MAX_PARTS = 64
# More than this is never read from the socket at once, so that OpenSSL's memory buffer stays small.
_MAX_RECEIVE_BYTES = 128 * 1024
# A longer first record is given to OpenSSL before it is complete. A ClientHello takes 300 to 2,000 bytes.
_MAX_HELLO_BYTES = 4 * 1024
# The header of a TLS record, and the type of one that carries a handshake message (RFC 8446, section 5.1).
_HEADER_BYTES = 5
_HANDSHAKE = 0x16
# For the close_notify alert on a stream that is not a socket.
_CLOSE_SECONDS = 1.0

Data = bytes | bytearray | memoryview


class PlainStream:
    """An accepted connection in the clear. The caller closes it; `as_stream` is for what follows HTTP on it."""

    __slots__ = ("_socket", "_unsent", "is_socket", "transport_stream")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream = stream
        # What `send_now` has left for `send_all`.
        self._unsent = b""
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        # Whether `receive_now` and `abort` work: false for the memory streams of tests.
        self.is_socket = self._socket is not None

    def as_stream(self) -> trio.abc.Stream:
        return self.transport_stream

    def receive_now(self) -> bytes | None:
        """Return up to RECEIVE_BYTES that have arrived: empty at the end, None if there are none yet.

        Raises BrokenResourceError.
        """
        if self._socket is None:
            return None
        try:
            return os.read(self._socket.fileno(), RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def receive_some(self, max_bytes: int = RECEIVE_BYTES) -> bytes | bytearray:
        """Return bytes when there are some; empty at the end. Cancelling it loses nothing. Raises BrokenResourceError."""
        if self._socket is None:
            return await self.transport_stream.receive_some(max_bytes)
        try:
            return await self._socket.recv(max_bytes)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def discard_some(self) -> int:
        """Read and throw away. Return how many bytes it was, 0 at the end. Raises BrokenResourceError."""
        return len(await self.receive_some())

    def write_now(self, data: bytes) -> int:
        """Return how many bytes the socket takes without waiting. Raises BrokenResourceError."""
        if self._socket is None:
            return 0
        try:
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def send_now(self, data: bytes) -> bool:
        """Send what can be sent without waiting. Return False if `send_all` has to be called, which sends the rest first.

        Raises BrokenResourceError.
        """
        self._unsent = data[self.write_now(data) :]
        return not self._unsent

    async def send_some(self, parts: Sequence[bytes | memoryview]) -> int:
        """Send at least one byte, and return how many were sent. Raises BrokenResourceError, ClosedResourceError."""
        try:
            if self._socket is None:
                data = b"".join(parts)
                await self.transport_stream.send_all(data)
                return len(data)
            if len(parts) == 1:
                return await self._socket.send(parts[0])
            return await self._socket.sendmsg(parts[:_MAX_PARTS])
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_all(self, data: Data) -> None:
        """Send all of it. Raises BrokenResourceError, ClosedResourceError."""
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        if self._socket is None:
            await self.transport_stream.send_all(data)
            return
        try:
            sent = await self._socket.send(data)
            while sent < len(data):
                sent += await self._socket.send(memoryview(data)[sent:])
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_last(self, data: bytes) -> None:
        """Send if the socket takes it at once: for a last message that the client can do without."""
        if self._socket is not None:
            with suppress(OSError):
                os.write(self._socket.fileno(), data)
            return
        with trio.move_on_after(_CLOSE_SECONDS), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.transport_stream.send_all(data)

    async def send_eof(self) -> None:
        """Tell the client that nothing follows; it may go on sending. Raises BrokenResourceError, ClosedResourceError."""
        if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
            await self.transport_stream.send_eof()

    def abort(self) -> None:
        """Close the socket. What waits for it ends with ClosedResourceError."""
        if self._socket is not None:
            self._socket.close()

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


class TLSStream(trio.abc.HalfCloseableStream):
    """The server's end of TLS over a stream. `wait_hello` and `do_handshake` come first, in this order.

    One task may receive while another one sends. What OpenSSL wants to send while it reads (an alert, the answer to a
    KeyUpdate) is sent by the next send, or before the next wait for the client.

    The end of the connection without a close_notify alert counts as an end: HTTP and WebSockets say themselves where
    they end. A cancelled send leaves the rest of its records to be sent first by the next one.
    """

    __slots__ = (
        *("_context", "_ended", "_flushed", "_flushing", "_incoming", "_outgoing", "_plain", "_receiving"),
        *("_sending", "_tls", "_unsent", "early", "is_socket"),
    )

    def __init__(self, stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
        self._plain = PlainStream(stream)
        self.is_socket = self._plain.is_socket
        self._context = context
        # What arrived before OpenSSL's state was created.
        self.early = b""
        self._tls: ssl.SSLObject | None = None
        self._incoming: ssl.MemoryBIO | None = None
        self._outgoing: ssl.MemoryBIO | None = None
        # Ciphertext that was taken from `_outgoing` and not yet sent.
        self._unsent: list[bytes | memoryview] = []
        self._receiving = self._sending = self._flushing = False
        # Whether the client's close_notify was read.
        self._ended = False
        # Set at the end of the present flush; exists while a sender waits for that.
        self._flushed: trio.Event | None = None

    @property
    def transport_stream(self) -> trio.abc.Stream:
        return self._plain.transport_stream

    def as_stream(self) -> trio.abc.Stream:
        return self

    # ---- the handshake

    async def wait_hello(self) -> bool:
        """Wait for the client's first record, and return whether it came before the end. Raises BrokenResourceError."""
        while not _is_complete_record(self.early):
            data = await self._plain.receive_some()
            if not data:
                return False
            self.early += data
        return True

    async def do_handshake(self) -> None:
        """Negotiate keys with the client. Raises BrokenResourceError, whose cause is OpenSSL's error if there is one."""
        incoming, outgoing = self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = self._context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(self.early)
        self.early = b""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
            except ssl.SSLError as error:
                # OpenSSL has written the alert that tells the client.
                await self._flush()
                raise trio.BrokenResourceError(f"the TLS handshake failed: {tls.reason_of(error)}") from error
            else:
                await self._flush()
                return
            if not await self._fill(RECEIVE_BYTES):
                raise trio.BrokenResourceError("the client closed the connection during the TLS handshake")

    # ---- receiving

    def receive_now(self) -> bytes | None:
        """As PlainStream.receive_now."""
        data = self._decrypt(RECEIVE_BYTES)
        if data is None:
            assert self._incoming is not None
            received = self._plain.receive_now()
            if not received:
                return received
            self._incoming.write(received)
            data = self._decrypt(RECEIVE_BYTES)
        return data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return bytes when there are some; empty at the end. Cancelling it loses nothing. Raises BrokenResourceError."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this TLS stream")
        size = min(max_bytes or RECEIVE_BYTES, _MAX_RECEIVE_BYTES)
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            data = self._decrypt(size)
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            while data is None:
                if not self._flushing:
                    await self._flush()
                if not await self._fill(size):
                    return b""
                data = self._decrypt(size)
            return data
        finally:
            self._receiving = False

    async def discard_some(self) -> int:
        """As PlainStream.discard_some; nothing is decrypted."""
        return await self._plain.discard_some()

    async def _fill(self, size: int) -> bool:
        """Wait for ciphertext. Return False at its end. Raises BrokenResourceError."""
        assert self._incoming is not None
        received = await self._plain.receive_some(size)
        self._incoming.write(received)
        return bool(received)

    def _decrypt(self, max_bytes: int) -> bytes | None:
        """Return the plaintext of the records that have arrived: empty at the end, None if there is none.

        Raises BrokenResourceError.
        """
        assert self._tls is not None
        assert self._incoming is not None
        parts: list[bytes] = []
        size = 0
        while size < max_bytes and (pending := self._incoming.pending + self._tls.pending()):
            try:
                # Plaintext is shorter than its ciphertext, so this is enough for a record without a buffer of 16 KiB.
                data = self._tls.read(min(pending, max_bytes - size))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                if parts:
                    # The next call raises the error again.
                    break
                raise trio.BrokenResourceError(f"TLS failed: {tls.reason_of(error)}") from error
            if not data:
                self._ended = True
                break
            parts.append(data)
            size += len(data)
        if not parts:
            return b"" if self._ended else None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # ---- sending

    def send_now(self, data: bytes) -> bool:
        """As PlainStream.send_now."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending to this TLS stream")
        assert self._outgoing is not None
        self._encrypt(data)
        if self._flushing or self._unsent:
            return False
        records = self._outgoing.read()
        sent = self._plain.write_now(records)
        if sent < len(records):
            self._unsent.append(memoryview(records)[sent:])
        return not self._unsent

    async def send_all(self, data: Data) -> None:
        """Send all of it. Raises BrokenResourceError, ClosedResourceError."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending to this TLS stream")
        self._sending = True
        try:
            while self._flushing:
                self._flushed = trio.Event()
                await self._flushed.wait()
            if not data:
                await trio.lowlevel.checkpoint()
                await self._flush()
            elif len(data) <= _FLUSH_BYTES:
                self._encrypt(data)
                await self._flush()
            else:
                view = memoryview(data)
                for start in range(0, len(view), _FLUSH_BYTES):
                    self._encrypt(view[start : start + _FLUSH_BYTES])
                    await self._flush()
        finally:
            self._sending = False

    def _encrypt(self, data: Data) -> None:
        """Add the records of `data` to what is to be sent. Raises BrokenResourceError."""
        assert self._tls is not None
        assert self._outgoing is not None
        try:
            if len(data) <= _RECORD_BYTES:
                self._tls.write(data)
                return
            write, read = self._tls.write, self._outgoing.read
            for start in range(0, len(data), _RECORD_BYTES):
                write(data[start : start + _RECORD_BYTES])
                self._unsent.append(read())
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"TLS failed: {tls.reason_of(error)}") from error

    async def _flush(self) -> None:
        """Send the ciphertext that there is, and what is added meanwhile. One task at a time may do this."""
        assert self._outgoing is not None
        self._flushing = True
        try:
            while self._unsent or self._outgoing.pending:
                if not self._unsent:
                    self._unsent.append(self._outgoing.read())
                sent = await self._plain.send_some(self._unsent)
                while sent and sent >= len(self._unsent[0]):
                    sent -= len(self._unsent.pop(0))
                if sent:
                    self._unsent[0] = memoryview(self._unsent[0])[sent:]
        finally:
            self._flushing = False
            if self._flushed is not None:
                self._flushed.set()
                self._flushed = None

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    # ---- closing

    async def send_eof(self) -> None:
        """Send close_notify, and end the sending half of the connection. Nothing is decrypted afterwards."""
        if self._tls is not None and not self._flushing:
            self._close_notify(self._tls)
            await self._flush()
        await self._plain.send_eof()

    def _close_notify(self, session: ssl.SSLObject) -> None:
        # OpenSSL has written the alert by the time it asks for the client's, or complains of data in its place.
        with suppress(ssl.SSLError):
            session.unwrap()

    def abort(self) -> None:
        """As PlainStream.abort."""
        self._plain.abort()

    async def aclose(self) -> None:
        """Close the connection, after close_notify unless data is unsent: the client shall see that some is missing."""
        try:
            if self._tls is not None and self._outgoing is not None and not self._flushing and not self._unsent:
                self._close_notify(self._tls)
                await self._plain.send_last(self._outgoing.read())
        finally:
            await self._plain.aclose()


class TLSListener(trio.abc.Listener[TLSStream]):
    """Accepts connections for TLS. Their handshakes happen in the tasks that serve them.

    `context` may be replaced; connections that are open keep theirs.
    """

    def __init__(self, listener: trio.abc.Listener[trio.abc.Stream], context: ssl.SSLContext) -> None:
        self._listener = listener
        self.context = context

    async def accept(self) -> TLSStream:
        return TLSStream(await self._listener.accept(), self.context)

    async def aclose(self) -> None:
        await self._listener.aclose()


def _is_complete_record(data: bytes) -> bool:
    """Whether OpenSSL can make something of the first bytes of a connection: a whole record, or no handshake at all."""
    if data[:1] and data[0] != _HANDSHAKE:
        return True
    length = int.from_bytes(data[3:_HEADER_BYTES], "big")
    return len(data) >= _HEADER_BYTES and (length > _MAX_HELLO_BYTES or len(data) >= _HEADER_BYTES + length)
