"""WebSocket frames (RFC 6455, section 5) that carry a stream of bytes. Law: no I/O; chance is handed in.

A tunnel's messages are nothing but a stream cut into pieces, so no message is ever put together here: `Frames` looks at
the headers, and gives each part of a payload as soon as it has come, whatever frame or message it belongs to. What is
kept between two calls is part of a header, of a control frame or of a character, 125 bytes at most. There is therefore
no limit to the size of a message. Text is taken for the bytes that it is written in.

What a peer must not do is an event like any other, and the last one, as a close is: the same bytes give the same events
in whatever pieces they come.

Masking is half of the cost of a tunnel as long as Python does it; the package websockets (extra
`orchard-cluster[fast]`) brings a function in C, which is used where it is installed.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NOT_UTF8, BROKEN = 1000, 1001, 1002, 1007, 1011  # codes of a close (section 7.4.1)
UNSAID, LOST = 1005, 1006  # never sent: they stand for a close without a code, and for none at all
MAX_CONTROL = 125  # bytes of the payload of a control frame
MAX_REASON = MAX_CONTROL - 2  # bytes of the reason beside a code
FIN, RSV, OPCODE = 0x80, 0x70, 0x0F  # bits of a header's first byte
MASKED = 0x80  # bit of its second one; the others are the length, or say that 16 or 64 bits of it follow:
LENGTH_16, LENGTH_64 = 126, 127
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of the handshake (section 4.2.2)

_SENDABLE = frozenset([*range(1000, 1004), *range(1007, 1015)])  # of the codes below 3000, those that a peer may send
_XOR = [bytes(byte ^ key for byte in range(256)) for key in range(256)]

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """How an end of a WebSocket was closed. `violation` marks that the peer broke the protocol, as `reason` says."""

    code: int
    reason: str = ""
    violation: bool = False


Event = Bytes | Ping | Pong | Close  # bytes are a part of what the stream carries


def accept(key: str) -> str:
    """Give the header Sec-WebSocket-Accept that proves to have read Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1((key + GUID).encode("latin-1"), usedforsecurity=False).digest()).decode()


# ---- out -----------------------------------------------------------------------------------------------------------


def masked_by_translation(data: Bytes, key: bytes) -> bytearray:
    """Mask or unmask: XOR with a key of 4 bytes, again and again."""
    out = bytearray(data)
    for place in range(4):
        out[place::4] = out[place::4].translate(_XOR[key[place]])
    return out


def _fastest() -> Callable[[Bytes, bytes], Bytes]:
    try:
        from websockets.speedups import apply_mask
    except ImportError:  # it is not installed, or not compiled for this machine
        return masked_by_translation
    return apply_mask


masked = _fastest()


def frame(opcode: int, payload: Bytes, key: bytes | None = None) -> tuple[Bytes, ...]:
    """Make the parts of a whole frame. With a key (4 bytes, unpredictable, for this frame alone) the payload is masked."""
    size = len(payload)
    bit = 0 if key is None else MASKED
    if size < LENGTH_16:
        header = bytes((FIN | opcode, bit | size))
    elif size < 1 << 16:
        header = bytes((FIN | opcode, bit | LENGTH_16)) + size.to_bytes(2, "big")
    else:
        header = bytes((FIN | opcode, bit | LENGTH_64)) + size.to_bytes(8, "big")
    return (header, payload) if key is None else (header, key, masked(payload, key))


def close_payload(code: int, reason: str) -> bytes:
    """Write down why; a reason that is too long is cut between two characters, codes that can't be sent are left out."""
    if code in (UNSAID, LOST):
        return b""
    return code.to_bytes(2, "big") + reason.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore").encode()


# ---- in ------------------------------------------------------------------------------------------------------------


class _ViolationError(Exception):
    """The peer broke the protocol."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.close = Close(code, reason, violation=True)


class Frames:
    """Reads one direction of a WebSocket. `masked` says whether its frames are to be: those of a client are."""

    def __init__(self, *, masked: bool) -> None:
        self._masked = masked
        self._header = bytearray()  # as far as it came
        self._opcode = 0  # of the frame whose payload comes; a continuation has that of its message
        self._final = False  # whether it is the last one of its message
        self._left = 0  # bytes of its payload that are to come
        self._key = b""  # for the next one of them
        self._control = bytearray()  # payload of a control frame
        self._message = 0  # opcode of the message that is not complete, 0: there is none
        self._text: codecs.IncrementalDecoder | None = None  # judges the present text
        self._done = False

    def feed(self, data: Bytes) -> list[Event]:
        """Take what came, and give what it means. After a Close there is nothing more.

        Parts of a payload may be views of `data`.
        """
        events: list[Event] = []
        view = memoryview(data)
        try:
            while len(view) and not self._done:
                view = self._payload(view, events) if self._left else self._head(view, events)
        except _ViolationError as violation:
            self._end(violation.close, events)
        return events

    def _end(self, close: Close, events: list[Event]) -> None:
        self._done = True
        events.append(close)

    def _head(self, view: memoryview, events: list[Event]) -> memoryview:
        """Take bytes of a header."""
        header = self._header
        need = _header_size(header)
        taken = need - len(header)
        header += view[:taken]
        if len(header) == need == _header_size(header):
            self._begin(header)
            del header[:]
            if not self._left:
                self._finish(events)
        return view[taken:]

    def _begin(self, header: bytearray) -> None:
        """Judge a whole header."""
        first, second = header[0], header[1]
        opcode, self._final = first & OPCODE, bool(first & FIN)
        size = second & ~MASKED
        if first & RSV:
            raise _ViolationError(PROTOCOL_ERROR, "a reserved bit is set, and no extension was agreed on")
        if bool(second & MASKED) != self._masked:
            whose = "a client is not masked" if self._masked else "the server is masked"
            raise _ViolationError(PROTOCOL_ERROR, f"a frame of {whose}")
        if opcode in (CLOSE, PING, PONG):
            if not self._final:
                raise _ViolationError(PROTOCOL_ERROR, f"a control frame, opcode {opcode}, is fragmented")
            if size > MAX_CONTROL:
                raise _ViolationError(PROTOCOL_ERROR, f"a control frame, opcode {opcode}, is over {MAX_CONTROL} bytes")
        elif opcode in (TEXT, BINARY):
            if self._message:
                raise _ViolationError(PROTOCOL_ERROR, "a message begins before the end of the one before")
        elif opcode != CONTINUATION:
            raise _ViolationError(PROTOCOL_ERROR, f"the opcode is {opcode}, which is reserved")
        elif not self._message:
            raise _ViolationError(PROTOCOL_ERROR, "a continuation of no message")
        self._key = bytes(header[-4:]) if self._masked else b""
        self._left = _length(size, header)
        if opcode < CLOSE:
            if opcode == TEXT:
                self._text = codecs.getincrementaldecoder("utf-8")()
            self._message = opcode = opcode or self._message
        self._opcode = opcode

    def _payload(self, view: memoryview, events: list[Event]) -> memoryview:
        """Take a part of a payload."""
        part: Bytes = view[: self._left]
        size = len(part)
        if self._masked:
            part = masked(part, self._key)
            if turn := size % 4:
                self._key = self._key[turn:] + self._key[:turn]
        self._left -= size
        if self._opcode >= CLOSE:
            self._control += part
        else:
            self._judge(part)
            events.append(part)
        if not self._left:
            self._finish(events)
        return view[size:]

    def _judge(self, part: Bytes, final: bool = False) -> None:
        if self._text is not None:
            try:
                self._text.decode(bytes(part), final)
            except UnicodeDecodeError as error:
                raise _ViolationError(NOT_UTF8, f"a text is not UTF-8: {error.reason}") from None

    def _finish(self, events: list[Event]) -> None:
        """See what the end of a frame means."""
        if self._opcode < CLOSE:
            if self._final:
                self._judge(b"", final=True)
                self._message, self._text = 0, None
            return
        payload = bytes(self._control)
        self._control.clear()
        if self._opcode == CLOSE:
            self._end(_close(payload), events)
        else:
            events.append(Ping(payload) if self._opcode == PING else Pong(payload))


class Boundaries:
    """Finds where the frames of one direction of a WebSocket end, and looks at nothing but their headers' lengths."""

    def __init__(self) -> None:
        self._header = bytearray()
        # Bytes of the payload that are still to come; None until the header is complete.
        self._left: int | None = None

    def measure(self, data: Bytes) -> tuple[int, int | None]:
        """Return how many bytes at the front of `data` belong to the present frame, and its opcode if it ends there.

        The next call must begin with the first byte after those. A frame that does not end in `data` has opcode None.
        """
        header, used = self._header, 0
        if self._left is None:
            while len(header) < (need := _header_size(header)):
                part = data[used : used + need - len(header)]
                if not part:
                    return used, None
                header += part
                used += len(part)
            size = header[1] & ~MASKED
            width = 2 if size == LENGTH_16 else 8 if size == LENGTH_64 else 0
            self._left = int.from_bytes(header[2 : 2 + width], "big") if width else size
        taken = min(self._left, len(data) - used)
        self._left -= taken
        if self._left:
            return used + taken, None
        opcode = header[0] & OPCODE
        header.clear()
        self._left = None
        return used + taken, opcode


def _header_size(header: bytearray) -> int:
    """Give how many bytes a header has, as far as it can be known of its beginning."""
    if len(header) < 2:
        return 2
    size = header[1] & ~MASKED
    return 2 + (2 if size == LENGTH_16 else 8 if size == LENGTH_64 else 0) + (4 if header[1] & MASKED else 0)


def _length(size: int, header: bytearray) -> int:
    """Give how long the payload is; a length that could be written shorter would let two readers see two things."""
    if size < LENGTH_16:
        return size
    width, least = (2, LENGTH_16) if size == LENGTH_16 else (8, 1 << 16)
    length = int.from_bytes(header[2 : 2 + width], "big")
    if length >> 63:
        raise _ViolationError(PROTOCOL_ERROR, "the length of a frame is over 63 bits")
    if length < least:
        raise _ViolationError(PROTOCOL_ERROR, f"the length {length} is written in {8 * width} bits, expected fewer")
    return length


def _close(payload: bytes) -> Close:
    """Read the payload of a close."""
    if not payload:
        return Close(UNSAID)
    if len(payload) == 1:
        raise _ViolationError(PROTOCOL_ERROR, "the code of a close is 1 byte, expected 2")
    code = int.from_bytes(payload[:2], "big")
    if code not in _SENDABLE and not 3000 <= code < 5000:
        raise _ViolationError(PROTOCOL_ERROR, f"the code of a close is {code}, which nobody may send")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError as error:
        raise _ViolationError(NOT_UTF8, f"the reason of a close is not UTF-8: {error.reason}") from None
